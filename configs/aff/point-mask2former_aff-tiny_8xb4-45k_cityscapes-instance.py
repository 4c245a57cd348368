_base_ = [
    '../_base_/iter_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/cityscapes_instance_aff.py',
    '../_base_/schedules/aff_45k.py',
]

model = dict(
    backbone=dict(alpha=8.0),
    panoptic_head=dict(num_things_classes=8, num_stuff_classes=0),
    panoptic_fusion_head=dict(num_things_classes=8, num_stuff_classes=0),
)
