# AutoFocusFormer under the Mask2Former that works on points, for semantic segmentation.  Tiny, ADE20K.
model = dict(
    type='EncoderDecoder',
    # Training images come padded; test images are padded to a multiple of 32.
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(type='boltz_mm.AFF', arch='tiny', out_type='points', nbhd_size=48, drop_path_rate=0.3),
    decode_head=dict(
        type='boltz_mm.PointMask2FormerSegHead',
        in_channels=[64, 128, 256, 512],
        num_classes=150,
        num_queries=100,
        pixel_decoder=dict(power=3.0, learnable_power=True),
        train_cfg=dict(num_points=12544, oversample_ratio=3.0, importance_sample_ratio=0.75),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
