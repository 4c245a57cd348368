# A small AutoFocusFormer under SegFormer's head, on the embedded dataset.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/seg_runtime.py',
    '../_base_/models/segformer_aff.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

model = dict(
    data_preprocessor=dict(size=None, size_divisor=32),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8)),
        nbhd_size=24,
    ),
    decode_head=dict(in_channels=[32, 64, 96, 128], channels=64, num_classes=8, norm_cfg=dict(type='BN')),
)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=10, max_keep_ckpts=2))
log_processor = dict(by_epoch=True)
