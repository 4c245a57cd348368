_base_ = [
    '../_base_/datasets/coco_category_id_detection.py',
    '../_base_/models/boxer_r50.py',
    '../_base_/schedules/boxer_50e.py',
]

train_dataloader = dict(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True))
