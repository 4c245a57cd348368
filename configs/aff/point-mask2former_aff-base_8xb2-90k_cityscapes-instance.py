_base_ = [
    '../_base_/iter_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/cityscapes_instance_aff.py',
    '../_base_/schedules/aff_90k.py',
]

model = dict(
    # Clusters of 24 and neighbourhoods of 144 as at 384 pixels.
    backbone=dict(arch='base_384', nbhd_size=144, alpha=8.0),
    panoptic_head=dict(
        in_channels=[128, 256, 512, 1024],
        num_things_classes=8,
        num_stuff_classes=0,
        num_queries=250,
    ),
    panoptic_fusion_head=dict(num_things_classes=8, num_stuff_classes=0),
    test_cfg=dict(max_per_image=250),
)
train_dataloader = dict(batch_size=2)
