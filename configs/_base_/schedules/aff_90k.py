# Cityscapes, base: 90,000 updates of 16 images.
_base_ = './aff_80k.py'

max_iters = 90000
train_cfg = dict(max_iters=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=max_iters + 1, by_epoch=False)]
auto_scale_lr = dict(base_batch_size=16)
