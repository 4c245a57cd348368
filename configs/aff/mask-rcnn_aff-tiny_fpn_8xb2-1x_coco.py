# AutoFocusFormer under FPN and Mask R-CNN: maps of strides 4 to 32 made of its tokens.
_base_ = [
    '../_base_/default_runtime.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
]

model = dict(
    backbone=dict(_delete_=True, type='boltz_mm.AFF', arch='tiny', nbhd_size=48),
    neck=[
        dict(type='boltz_mm.PointsToGrid'),
        dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5),
    ],
)
optim_wrapper = dict(
    _delete_=True,
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, norm_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
