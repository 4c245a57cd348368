# COCO: 92,188 updates of 64 images (50 epochs), dropped by 10 at 81,945 and 88,773.
_base_ = './aff_80k.py'

max_iters = 92188
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type='MultiStepLR', milestones=[81945, 88773], gamma=0.1, by_epoch=False, begin=0, end=max_iters)
]
auto_scale_lr = dict(base_batch_size=64)
