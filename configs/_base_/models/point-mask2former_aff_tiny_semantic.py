# The small AutoFocusFormer and Mask2Former, for semantic segmentation.
_base_ = './point-mask2former_aff_semantic.py'

model = dict(
    data_preprocessor=dict(size=None, size_divisor=32),
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8), mlp_ratio=2.0
        ),
        cluster_size=8,
        nbhd_size=24,
        drop_path_rate=0.0,
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    ),
    decode_head=dict(
        in_channels=[32, 64, 96, 128],
        feat_channels=64,
        out_channels=64,
        num_classes=8,
        num_queries=20,
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss', use_sigmoid=False, loss_weight=6.0, class_weight=[1.0] * 8 + [0.1]
        ),
        pixel_decoder=dict(num_heads=4, num_layers=2, feedforward_channels=128),
        transformer_decoder=dict(num_heads=4, num_layers=3, feedforward_channels=128),
        train_cfg=dict(num_points=2048),
    ),
)
