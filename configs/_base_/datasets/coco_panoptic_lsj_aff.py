# COCO panoptic with the same large scale jitter.
_base_ = './coco_instance_lsj_aff.py'

data_root = 'data/coco/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='boltz_mm.LoadPanopticSegments'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='boltz_mm.BoxeRScaleJitter', target=(1024, 1024), min_scale=0.1, max_scale=2.0),
    dict(type='Pad', size=(1024, 1024), pad_val=dict(img=(128, 128, 128), seg=0)),
    dict(type='boltz_mm.PanopticSegmentsToInstances', keep_empty=False),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    dataset=dict(
        type='boltz_mm.CheckedCocoPanopticDataset',
        ann_file='annotations/panoptic_train2017.json',
        data_prefix=dict(img='train2017/', seg='annotations/panoptic_train2017/'),
        filter_cfg=None,
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='boltz_mm.CheckedCocoPanopticDataset',
        ann_file='annotations/panoptic_val2017.json',
        data_prefix=dict(img='val2017/', seg='annotations/panoptic_val2017/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='boltz_mm.CocoPanopticQualityMetric',
    ann_file=data_root + 'annotations/panoptic_val2017.json',
    seg_prefix=data_root + 'annotations/panoptic_val2017/',
)
test_evaluator = val_evaluator
