# A small AutoFocusFormer and Mask2Former for training from scratch in minutes: 64 channels, two layers in the pixel
# decoder, three in the transformer, 20 queries.
_base_ = './point-mask2former_aff.py'

tiny_backbone = dict(
    arch=dict(_delete_=True, embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8), mlp_ratio=2.0),
    cluster_size=8,
    nbhd_size=24,
    drop_path_rate=0.0,
    # The official deviation of 0.02 belongs to wide layers.
    init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
)
# Telling classes apart is what takes longest from scratch: it weighs three times as much as in the paper.
loss_cls = dict(type='mmdet.CrossEntropyLoss', use_sigmoid=False, loss_weight=6.0, class_weight=[1.0] * 3 + [0.1])
tiny_head = dict(
    in_channels=[32, 64, 96, 128],
    feat_channels=64,
    out_channels=64,
    num_queries=20,
    pixel_decoder=dict(num_heads=4, num_layers=2, feedforward_channels=128),
    transformer_decoder=dict(num_heads=4, num_layers=3, feedforward_channels=128),
)
model = dict(
    backbone=tiny_backbone,
    panoptic_head=dict(num_things_classes=3, loss_cls=loss_cls, **tiny_head),
    panoptic_fusion_head=dict(num_things_classes=3),
    train_cfg=dict(num_points=2048),
    # Trained for minutes, queries are less sure of themselves.
    test_cfg=dict(object_mask_thr=0.5),
)
