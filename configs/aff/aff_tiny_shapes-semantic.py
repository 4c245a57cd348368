# A small AutoFocusFormer with Mask2Former on the embedded dataset, semantic; trains on a CPU in minutes.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/seg_runtime.py',
    '../_base_/models/point-mask2former_aff_tiny_semantic.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

default_hooks = dict(checkpoint=dict(by_epoch=True, interval=10, max_keep_ckpts=2))
log_processor = dict(by_epoch=True)
