# BoxeR-2D for boxes, ResNet-50, with the 91 outputs of the official COCO weights (labels are raw category ids).
model = dict(
    type='boltz_mm.BoxeR',
    num_queries=300,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(1, 2, 3),
        # Every convolution is trained, the stem included; the norms are constants.
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet50-19c8e357.pth'),
    ),
    neck=dict(
        type='boltz_mm.BoxeRNeck',
        in_channels=[512, 1024, 2048],
        out_channels=256,
        num_outs=4,
        norm_cfg=dict(type='GN', num_groups=32),
    ),
    # A token's window is ref_size cells of its level wide and high.
    positional_encoding=dict(embed_dims=256, ref_size=4),
    encoder=dict(
        num_layers=6,
        layer_cfg=dict(embed_dims=256, num_heads=8, num_levels=4, feedforward_channels=1024, dropout=0.0),
    ),
    decoder=dict(
        num_layers=6,
        layer_cfg=dict(embed_dims=256, num_heads=8, num_levels=4, feedforward_channels=1024, dropout=0.0),
    ),
    bbox_head=dict(
        type='boltz_mm.BoxeRHead',
        num_classes=91,
        embed_dims=256,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='boltz_mm.ReducedHungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0, eps=1e-8),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=100),
)
