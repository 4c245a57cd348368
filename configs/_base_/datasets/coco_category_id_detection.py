# COCO boxes with raw category ids as labels and BoxeR's augmentation: half of the images are cropped in between.
dataset_type = 'boltz_mm.CocoCategoryIdDataset'
data_root = 'data/coco/'
backend_args = None

# Decoding equals PIL's convert('RGB'), EXIF rotation ignored, as in the official code.
load_image = dict(
    type='LoadImageFromFile',
    color_type='color_ignore_orientation',
    imdecode_backend='pillow',
    backend_args=backend_args,
)
random_resize = dict(
    type='boltz_mm.BoxeRRandomResize', sizes=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], max_size=1333
)
train_pipeline = [
    load_image,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='boltz_mm.BoxeRRandomFlip', prob=0.5),
    dict(
        type='boltz_mm.BoxeRRandomChoice',
        transforms=[
            [random_resize],
            [
                dict(type='boltz_mm.BoxeRRandomResize', sizes=[400, 500, 600]),
                dict(type='boltz_mm.BoxeRRandomCrop', min_size=384, max_size=600),
                random_resize,
            ],
        ],
        prob=[0.5, 0.5],
    ),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    load_image,
    dict(type='boltz_mm.BoxeRResize', size=800, max_size=1333),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        # Images without objects are trained on too.
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
        backend_args=backend_args,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
        backend_args=backend_args,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type='boltz_mm.CocoCategoryIdMetric',
    ann_file=data_root + 'annotations/instances_val2017.json',
    metric=['bbox'],
    format_only=False,
    backend_args=backend_args,
)
test_evaluator = val_evaluator
