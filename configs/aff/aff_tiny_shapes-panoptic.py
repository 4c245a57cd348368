# A small AutoFocusFormer with Mask2Former on the embedded dataset, panoptic; trains on a CPU in minutes.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/point-mask2former_aff_tiny.py',
    '../_base_/datasets/shapes_panoptic.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

model = dict(
    panoptic_head=dict(num_stuff_classes=5, loss_cls=dict(class_weight=[1.0] * 8 + [0.1])),
    panoptic_fusion_head=dict(num_stuff_classes=5),
    test_cfg=dict(panoptic_on=True, instance_on=False),
)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=2, save_best='coco_panoptic/PQ', rule='greater'))
