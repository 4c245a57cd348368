# A small AutoFocusFormer under FPN and Mask R-CNN, on the embedded dataset.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/default_runtime.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='boltz_mm.AFF',
        arch=dict(embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8)),
        nbhd_size=24,
    ),
    neck=[
        dict(type='boltz_mm.PointsToGrid'),
        dict(type='FPN', in_channels=[32, 64, 96, 128], out_channels=64, num_outs=5),
    ],
    # The objects are from 6 pixels up.
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=3),
    ),
)
train_dataloader = dict(batch_size=8)
