# As the detection data, with masks: polygons are rasterised at the size of the image before anything else.
_base_ = './coco_category_id_detection.py'

load_annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=True)
train_pipeline = [
    {{_base_.load_image}},
    load_annotations,
    dict(type='boltz_mm.BoxeRRandomFlip', prob=0.5),
    dict(
        type='boltz_mm.BoxeRRandomChoice',
        transforms=[
            [{{_base_.random_resize}}],
            [
                dict(type='boltz_mm.BoxeRRandomResize', sizes=[400, 500, 600]),
                dict(type='boltz_mm.BoxeRRandomCrop', min_size=384, max_size=600),
                {{_base_.random_resize}},
            ],
        ],
        prob=[0.5, 0.5],
    ),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
