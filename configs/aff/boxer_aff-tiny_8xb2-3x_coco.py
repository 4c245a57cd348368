# AutoFocusFormer under BoxeR with masks: maps of strides 8, 16 and 32 made of its tokens.
_base_ = '../boxer/boxer_r50_mask_8xb2-3x_coco.py'

model = dict(
    backbone=dict(_delete_=True, type='boltz_mm.AFF', arch='tiny', nbhd_size=48, out_indices=(1, 2, 3)),
    neck=[
        dict(type='boltz_mm.PointsToGrid', levels=(1, 2, 3)),
        dict(
            type='boltz_mm.BoxeRNeck',
            in_channels=[128, 256, 512],
            out_channels=256,
            num_outs=4,
            norm_cfg=dict(type='GN', num_groups=32),
        ),
    ],
)
