# 270k updates of 16 images, drops at 210k and 250k, warm-up over 1000 updates.
# AdamW decays every parameter, norms and biases included; backbone and box offsets learn at a tenth of the rate.
_base_ = '../default_runtime.py'

optim_wrapper = dict(
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), eps=1e-9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1), 'linear_box': dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=270000, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# The last update of the warm-up is number 1000 (counted from 0), which has the full rate already.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1001),
    dict(type='MultiStepLR', milestones=[210000, 250000], gamma=0.1, by_epoch=False, begin=0, end=270000),
]

default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)

auto_scale_lr = dict(enable=False, base_batch_size=16)
