# Does it learn at all?  The small BoxeR learns eight real COCO images by heart, at a short side of 256 pixels; a box
# AP50 far below 1 at the end means that something in data, losses or model is broken.
# Data: a folder in COCO's layout with train2017, named by the variable BOLTZ_MM_COCO100; data/coco if it is not set.
_base_ = [
    '../_base_/datasets/coco_category_id_instance.py',
    '../_base_/models/boxer_tiny.py',
    '../_base_/schedules/boxer_32e.py',
]

data_root = '{{$BOLTZ_MM_COCO100:data/coco}}'
ann_file = 'annotations/instances_train2017.json'
eight = dict(data_root=data_root, ann_file=ann_file, data_prefix=dict(img='train2017/'), indices=8)
resize = dict(type='boltz_mm.BoxeRResize', size=256, max_size=400)
pack = dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
pipeline = [{{_base_.load_image}}, {{_base_.load_annotations}}, resize, pack]

model = dict(num_queries=100)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    sampler=dict(type='DefaultSampler'),
    dataset=dict(pipeline=pipeline, **eight),
)
val_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(pipeline=pipeline, **eight))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/' + ann_file, seen_images_only=True)
test_evaluator = val_evaluator

# Two updates an epoch: 1200 updates.
max_epochs = 600
train_cfg = dict(max_epochs=max_epochs, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-5, begin=0, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=200))
