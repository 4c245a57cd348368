# An extra: COCO panoptic with the recipe of COCO instances.
_base_ = [
    '../_base_/iter_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/coco_panoptic_lsj_aff.py',
    '../_base_/schedules/aff_50e.py',
]

model = dict(
    panoptic_head=dict(num_stuff_classes=53, pixel_decoder=dict(power=2.0, learnable_power=False)),
    panoptic_fusion_head=dict(num_stuff_classes=53),
    test_cfg=dict(panoptic_on=True, instance_on=False),
)
