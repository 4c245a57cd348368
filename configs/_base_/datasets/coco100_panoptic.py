# The same real images, panoptic.
_base_ = './coco_panoptic_lsj_aff.py'

data_root = '{{$BOLTZ_MM_COCO100:data/coco}}'
ann_file = 'annotations/panoptic_train2017.json'
data_prefix = dict(img='train2017/', seg='annotations/panoptic_train2017/')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.LoadPanopticSegments'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='boltz_mm.RandomShortEdgeResize', sizes=[224, 256], max_size=400),
    dict(type='boltz_mm.PanopticSegmentsToInstances', keep_empty=False),
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
    dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/' + ann_file, seg_prefix=data_root + '/' + data_prefix['seg'])
test_evaluator = val_evaluator
