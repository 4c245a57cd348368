# AutoFocusFormer on ImageNet: 300 epochs with 4096 images an update, a cosine that runs from the first update on.
# The rate is 5e-4 for every 512 images, the first and last rates have fixed ratios to it.
max_epochs = 300
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # No decay of whatever has one dimension: norms, biases, blank tokens, layer scales.
    paramwise_cfg=dict(flat_decay_mult=0.0, bias_decay_mult=0.0, norm_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(
        type='boltz_mm.WarmupCosineLR',
        warmup=20,
        total=max_epochs,
        start_ratio=1e-3,
        min_ratio=1e-2,
        convert_to_iter_based=True,
    )
]
auto_scale_lr = dict(enable=False, base_batch_size=4096)
