_base_ = [
    '../_base_/iter_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/cityscapes_panoptic_aff.py',
    '../_base_/schedules/aff_90k.py',
]

model = dict(
    # Clusters of 24 and neighbourhoods of 144 as at 384 pixels.
    backbone=dict(arch='base_384', nbhd_size=144, alpha=8.0),
    panoptic_head=dict(
        in_channels=[128, 256, 512, 1024],
        num_things_classes=8,
        num_stuff_classes=11,
        num_queries=250,
    ),
    panoptic_fusion_head=dict(
        num_things_classes=8, num_stuff_classes=11, thing_classes=[11, 12, 13, 14, 15, 16, 17, 18]
    ),
    test_cfg=dict(panoptic_on=True, instance_on=False),
)
train_dataloader = dict(batch_size=2)
