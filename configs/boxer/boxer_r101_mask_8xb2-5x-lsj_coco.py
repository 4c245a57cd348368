_base_ = [
    '../_base_/datasets/coco_category_id_instance_lsj.py',
    '../_base_/models/boxer_r50_mask.py',
    '../_base_/schedules/boxer_5x.py',
]

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet101-5d3b4d8f.pth'),
    )
)
