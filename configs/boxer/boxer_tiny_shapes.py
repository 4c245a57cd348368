# A small BoxeR with masks on the embedded dataset; trains on a CPU in minutes.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/models/boxer_r50_mask.py',
]

layer_cfg = dict(embed_dims=64, num_heads=4, feedforward_channels=128)
model = dict(
    num_queries=100,
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        # Trained from scratch: the norms learn.
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=64, norm_cfg=dict(num_groups=16)),
    positional_encoding=dict(embed_dims=64),
    encoder=dict(num_layers=2, layer_cfg=layer_cfg),
    decoder=dict(num_layers=2, layer_cfg=dict(layer_cfg, grid_size=14)),
    bbox_head=dict(num_classes=3, embed_dims=64),
)

optim_wrapper = dict(
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, eps=1e-9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={'linear_box': dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)

max_epochs = 32
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='MultiStepLR', milestones=[26], gamma=0.1, by_epoch=True, begin=0, end=max_epochs),
]

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=4, max_keep_ckpts=2, save_best='coco/bbox_mAP'),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
