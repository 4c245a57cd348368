# A small AutoFocusFormer on the embedded dataset: which shape is in the image?  Trains on a CPU in minutes.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/pretrain_runtime.py',
    '../_base_/models/aff_cls.py',
    '../_base_/datasets/shapes_cls.py',
    '../_base_/schedules/aff_shapes.py',
]

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8), mlp_ratio=2.0
        ),
        cluster_size=8,
        nbhd_size=24,
    ),
    head=dict(num_classes=3, in_channels=128),
    train_cfg=dict(_delete_=True),
)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=2))
