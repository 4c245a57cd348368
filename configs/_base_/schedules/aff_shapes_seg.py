# As for the classification of shapes, with small batches: 4500 updates of 8 images.
_base_ = './aff_shapes.py'

max_epochs = 60
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=0.5))
param_scheduler = [
    dict(
        type='boltz_mm.WarmupCosineLR',
        warmup=1,
        total=max_epochs,
        start_ratio=1e-2,
        min_ratio=1e-2,
        convert_to_iter_based=True,
    )
]
auto_scale_lr = dict(base_batch_size=8)
