# AutoFocusFormer, semantic and panoptic segmentation: AdamW with a polynomial decay and no warm-up, a tenth of the rate
# for the backbone, no decay of norms and embeddings.
max_iters = 80000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='boltz_mm.FiniteOptimWrapper',
    constructor='boltz_mm.ModuleTypeOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, embed_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=0.01),
)
# lr * (1 - t / max_iters)^0.9: mmengine divides by end - 1.
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=max_iters + 1, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
