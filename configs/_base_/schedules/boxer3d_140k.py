# 140k updates of 16 point clouds: warm-up over 5000, then a cosine down to 0.5 % of each group's rate.
_base_ = '../default_runtime.py'

optim_wrapper = dict(
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={'linear_box': dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=5001),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.005, by_epoch=False, begin=5000, end=140000),
]

auto_scale_lr = dict(enable=False, base_batch_size=16)
