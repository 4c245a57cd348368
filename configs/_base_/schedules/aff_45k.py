# Cityscapes: 45,000 updates of 32 images.
_base_ = './aff_80k.py'

max_iters = 45000
train_cfg = dict(max_iters=max_iters)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=max_iters + 1, by_epoch=False)]
