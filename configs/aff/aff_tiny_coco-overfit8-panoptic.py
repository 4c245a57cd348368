# Does it learn at all?  A small AutoFocusFormer learns eight real COCO images by heart, panoptic, at a short side of
# 256 pixels; a PQ far below 100 at the end means that something in data, losses or model is broken.
# Data: a folder in COCO's layout with train2017, named by the variable BOLTZ_MM_COCO100; data/coco if it is not set.
_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/point-mask2former_aff_tiny.py',
    '../_base_/datasets/coco100_panoptic.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

model = dict(
    panoptic_head=dict(
        num_things_classes=80,
        num_stuff_classes=53,
        num_queries=50,
        loss_cls=dict(class_weight=[1.0] * 133 + [0.1]),
    ),
    panoptic_fusion_head=dict(num_things_classes=80, num_stuff_classes=53),
    train_cfg=dict(num_points=4096),
    test_cfg=dict(panoptic_on=True, instance_on=False),
)
# Neither flipped nor resized at random.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.LoadPanopticSegments'),
    dict(type='boltz_mm.RandomShortEdgeResize', sizes=256, max_size=400),
    dict(type='boltz_mm.PanopticSegmentsToInstances', keep_empty=False),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(batch_size=4, dataset=dict(indices=8, pipeline=pipeline))
val_dataloader = dict(dataset=dict(indices=8))
test_dataloader = val_dataloader

# Two updates an epoch: 1200 updates.
max_epochs = 600
train_cfg = dict(max_epochs=max_epochs, val_interval=200)
param_scheduler = [
    dict(
        type='boltz_mm.WarmupCosineLR',
        warmup=25,
        total=max_epochs,
        start_ratio=1e-2,
        min_ratio=1e-2,
        convert_to_iter_based=True,
    )
]
default_hooks = dict(checkpoint=dict(interval=200))
