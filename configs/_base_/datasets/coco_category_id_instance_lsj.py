# As the instance data, with the scale jitter of the 5x recipes in the place of resizing and cropping.
_base_ = './coco_category_id_instance.py'

train_pipeline = [
    {{_base_.load_image}},
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=True),
    dict(type='boltz_mm.BoxeRRandomFlip', prob=0.5),
    dict(type='boltz_mm.BoxeRScaleJitter', target=(1024, 1024), min_scale=0.4, max_scale=2.0),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
