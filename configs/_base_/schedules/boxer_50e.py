# 50 epochs of batches of 32, one drop after 40, no warm-up.
_base_ = './boxer_3x.py'

max_epochs = 50
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='MultiStepLR', milestones=[40], gamma=0.1, by_epoch=True, begin=0, end=max_epochs),
]

default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
log_processor = dict(by_epoch=True)

auto_scale_lr = dict(base_batch_size=32)
