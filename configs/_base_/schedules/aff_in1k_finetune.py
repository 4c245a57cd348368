# From ImageNet-22K weights to ImageNet-1K: 30 epochs, almost no decay; 2e-5 for every 512 images.
_base_ = './aff_in1k.py'

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))
param_scheduler = [
    dict(
        type='boltz_mm.WarmupCosineLR',
        warmup=5,
        total=max_epochs,
        start_ratio=1e-3,
        min_ratio=1e-2,
        convert_to_iter_based=True,
    )
]
auto_scale_lr = dict(base_batch_size=512)
