# AdamW with AutoFocusFormer's cosine, for models that are trained from scratch in minutes.
max_epochs = 40
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=10)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, bias_decay_mult=0.0, norm_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(
        type='boltz_mm.WarmupCosineLR',
        warmup=2,
        total=max_epochs,
        start_ratio=1e-2,
        min_ratio=1e-2,
        convert_to_iter_based=True,
    )
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
