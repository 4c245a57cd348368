# Classes in the order of the official training ids: things are the last.
_base_ = [
    '../_base_/iter_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/cityscapes_panoptic_aff.py',
    '../_base_/schedules/aff_45k.py',
]

model = dict(
    backbone=dict(alpha=8.0),
    panoptic_head=dict(num_things_classes=8, num_stuff_classes=11),
    panoptic_fusion_head=dict(
        num_things_classes=8, num_stuff_classes=11, thing_classes=[11, 12, 13, 14, 15, 16, 17, 18]
    ),
    test_cfg=dict(panoptic_on=True, instance_on=False),
)
