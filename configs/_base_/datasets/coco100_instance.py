# A folder of real images in COCO layout with train2017, named by the variable BOLTZ_MM_COCO100 (data/coco if it is not
# set), for trying things on a CPU: short sides of 224 and 256 pixels.  The training images are evaluated too.
_base_ = './coco_instance_lsj_aff.py'

data_root = '{{$BOLTZ_MM_COCO100:data/coco}}'
ann_file = 'annotations/instances_train2017.json'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='boltz_mm.RandomShortEdgeResize', sizes=[224, 256], max_size=400),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.RandomShortEdgeResize', sizes=256, max_size=400),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(data_root=data_root, ann_file=ann_file, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=dict(img='train2017/'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/' + ann_file)
test_evaluator = val_evaluator
