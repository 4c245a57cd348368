# A small BoxeR with masks for training from scratch in minutes: a narrow ResNet-18 with a deep stem, levels of strides
# 4, 8 and 16 (the objects are small), 64 channels, two layers each, masks of 16 x 16.
_base_ = './boxer_r50_mask.py'

levels = dict(embed_dims=64, num_heads=4, num_levels=3, feedforward_channels=128)
model = dict(
    num_queries=40,
    backbone=dict(
        _delete_=True,
        type='ResNetV1d',
        depth=18,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        base_channels=32,
        stem_channels=32,
        # Trained from scratch: the norms learn.
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=64, num_outs=3, norm_cfg=dict(num_groups=8)),
    positional_encoding=dict(embed_dims=64),
    encoder=dict(num_layers=2, layer_cfg=levels),
    decoder=dict(num_layers=2, layer_cfg=dict(levels, grid_size=8)),
    # Telling classes apart is what takes longest from scratch: it weighs three times as much as in the paper.
    bbox_head=dict(embed_dims=64, loss_cls=dict(loss_weight=6.0)),
)
