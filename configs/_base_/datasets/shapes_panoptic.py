# The embedded dataset, panoptic: shapes and background textures.
# Made by: python tools/dataset_converters/make_shapes.py --out data/shapes
data_root = 'data/shapes/'
metainfo = dict(
    classes=('circle', 'square', 'triangle', 'smooth', 'cloudy', 'striped', 'checked', 'speckled'),
    thing_classes=('circle', 'square', 'triangle'),
    stuff_classes=('smooth', 'cloudy', 'striped', 'checked', 'speckled'),
    palette=[
        (220, 20, 60), (0, 110, 230), (40, 170, 60),
        (128, 128, 128), (170, 180, 200), (120, 140, 110), (190, 170, 140), (90, 90, 110),
    ],
)  # fmt: skip

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.LoadPanopticSegments'),
    # The shapes lie in any direction, so every flip gives an image that could have been drawn.
    dict(type='mmdet.RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='boltz_mm.PanopticSegmentsToInstances'),
    dict(type='mmdet.PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='mmdet.Resize', scale=(128, 128), keep_ratio=True),
    dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='boltz_mm.CheckedCocoPanopticDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/panoptic_train.json',
        data_prefix=dict(img='train/', seg='annotations/panoptic_train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='boltz_mm.CheckedCocoPanopticDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/panoptic_val.json',
        data_prefix=dict(img='val/', seg='annotations/panoptic_val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='boltz_mm.CocoPanopticQualityMetric',
    ann_file=data_root + 'annotations/panoptic_val.json',
    seg_prefix=data_root + 'annotations/panoptic_val/',
    classwise=True,
)
test_evaluator = val_evaluator
