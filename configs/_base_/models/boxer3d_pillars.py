# BoxeR-3D for Waymo: point pillars, two levels of bird's-eye-view maps, rotated box attention.
point_cloud_range = [-75.0, -75.0, -3.0, 75.0, 75.0, 5.0]  # x, y, z minimum and maximum in metres
layer_cfg = dict(embed_dims=256, num_heads=8, num_levels=2, feedforward_channels=1024, dropout=0.0)

model = dict(
    type='boltz_mm.BoxeR3D',
    num_queries=300,
    backbone=dict(
        type='boltz_mm.PillarNet',
        in_channels=5,  # x, y, z, tanh(intensity), elongation
        voxel_size=(0.32, 0.32, 12.0),
        point_cloud_range=point_cloud_range,
        max_points=20,
        max_voxels=(32000, 60000),  # in training, at test time
        feat_channels=(64, 128),
        stage_layers=(2, 4, 2),
        stage_channels=(256, 512, 1024),
        stage_strides=(1, 2, 2),
        out_indices=(1, 2),
        # Published: synchronised norms; sync_bn = 'torch' in a config makes mmengine convert these in distributed runs.
        norm_cfg=dict(type='BN', eps=1e-3, momentum=0.01),
    ),
    neck=dict(
        type='boltz_mm.BoxeRNeck',
        in_channels=[512, 1024],
        out_channels=256,
        norm_cfg=dict(type='GN', num_groups=32),
    ),
    encoder=dict(type='boltz_mm.Box3dTransformerEncoder', num_layers=2, layer_cfg=layer_cfg),
    decoder=dict(type='boltz_mm.Box3dTransformerDecoder', num_layers=2, layer_cfg=layer_cfg),
    bbox_head=dict(
        type='boltz_mm.BoxeR3DHead',
        num_classes=5,  # unknown, vehicle, pedestrian, sign, cyclist; vehicle and pedestrian were trained
        embed_dims=256,
        num_anchors=3,
        bbox_coder=dict(type='boltz_mm.Box3dCoder', point_cloud_range=point_cloud_range),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='boltz_mm.Box3dGIoULoss', loss_weight=2.0),
        loss_heading=dict(type='L1Loss', loss_weight=4.0),
    ),
    test_cfg=dict(max_per_sample=125),
)
