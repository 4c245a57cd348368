_base_ = './boxer_r50_8xb2-3x_coco.py'

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet101-5d3b4d8f.pth'),
    )
)

# This recipe alone of the 3x recipes has no warm-up.
param_scheduler = [
    dict(type='MultiStepLR', milestones=[210000, 250000], gamma=0.1, by_epoch=False, begin=0, end=270000),
]
