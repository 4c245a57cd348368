# One epoch over a hundred real images of every aspect: does all of it run?
# Data: a folder in COCO's layout with train2017, named by the variable BOLTZ_MM_COCO100; data/coco if it is not set.
_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/coco100_panoptic.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

model = dict(
    backbone=dict(arch='mini', drop_path_rate=0.0),
    panoptic_head=dict(in_channels=[32, 128, 256, 384], num_stuff_classes=53),
    panoptic_fusion_head=dict(num_stuff_classes=53),
    test_cfg=dict(panoptic_on=True, instance_on=False),
)
max_epochs = 1
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20)]
