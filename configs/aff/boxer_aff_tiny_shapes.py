# A small AutoFocusFormer under the small BoxeR, on the embedded dataset.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = '../boxer/boxer_tiny_shapes.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='boltz_mm.AFF',
        arch=dict(embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8)),
        nbhd_size=24,
        out_indices=(0, 1, 2),
    ),
    neck=[
        dict(type='boltz_mm.PointsToGrid'),
        dict(
            type='boltz_mm.BoxeRNeck',
            in_channels=[32, 64, 96],
            out_channels=64,
            num_outs=3,
            norm_cfg=dict(type='GN', num_groups=8),
        ),
    ],
)
