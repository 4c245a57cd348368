# AutoFocusFormer under the Mask2Former that works on points: instances and panoptic.  Tiny, with the things of COCO.
num_things_classes = 80
num_stuff_classes = 0
model = dict(
    type='boltz_mm.PointMask2Former',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_mask=True,
        mask_pad_value=0,
    ),
    backbone=dict(type='boltz_mm.AFF', arch='tiny', out_type='points', nbhd_size=48, drop_path_rate=0.3),
    panoptic_head=dict(
        type='boltz_mm.PointMask2FormerHead',
        in_channels=[64, 128, 256, 512],
        num_things_classes=num_things_classes,
        num_stuff_classes=num_stuff_classes,
        num_queries=100,
        # The exponent of the squared distance in the interpolation; learned.
        pixel_decoder=dict(power=3.0, learnable_power=True),
        # The fusion head enlarges the masks that it needs.
        upsample=False,
    ),
    panoptic_fusion_head=dict(
        type='boltz_mm.PointMaskFusionHead',
        num_things_classes=num_things_classes,
        num_stuff_classes=num_stuff_classes,
    ),
    train_cfg=dict(num_points=12544, oversample_ratio=3.0, importance_sample_ratio=0.75),
    test_cfg=dict(panoptic_on=False, instance_on=True, max_per_image=100, object_mask_thr=0.8, iou_thr=0.8),
)
