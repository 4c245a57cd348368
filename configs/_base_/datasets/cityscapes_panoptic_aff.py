# Cityscapes panoptic (the files of csCreatePanopticImgs) with AutoFocusFormer's augmentation.
dataset_type = 'boltz_mm.CityscapesPanopticDataset'
data_root = 'data/cityscapes/'
sizes = [512, 614, 716, 819, 921, 1024, 1126, 1228, 1331, 1433, 1536, 1638, 1740, 1843, 1945, 2048]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.LoadPanopticSegments'),
    dict(type='boltz_mm.RandomShortEdgeResize', sizes=sizes, max_size=4096),
    # width, height
    dict(type='RandomCrop', crop_size=(1024, 512), crop_type='absolute', allow_negative_crop=True),
    dict(type='mmseg.PhotoMetricDistortion'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='boltz_mm.PanopticSegmentsToInstances'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.RandomShortEdgeResize', sizes=1024, max_size=2048),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='gtFine/cityscapes_panoptic_train.json',
        data_prefix=dict(img='leftImg8bit/train/', seg='gtFine/cityscapes_panoptic_train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='gtFine/cityscapes_panoptic_val.json',
        data_prefix=dict(img='leftImg8bit/val/', seg='gtFine/cityscapes_panoptic_val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='boltz_mm.CocoPanopticQualityMetric',
    ann_file=data_root + 'gtFine/cityscapes_panoptic_val.json',
    seg_prefix=data_root + 'gtFine/cityscapes_panoptic_val/',
    classwise=True,
)
test_evaluator = val_evaluator
