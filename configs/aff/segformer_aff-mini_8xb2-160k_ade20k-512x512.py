# AutoFocusFormer under SegFormer's head, with the schedule of SegFormer.
_base_ = [
    '../_base_/seg_runtime.py',
    '../_base_/models/segformer_aff.py',
    '../_base_/datasets/ade20k_aff.py',
    '../_base_/schedules/aff_80k.py',
]

train_dataloader = dict(batch_size=2)
max_iters = 160000
train_cfg = dict(max_iters=max_iters)
optim_wrapper = dict(
    _delete_=True,
    type='boltz_mm.FiniteOptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(head=dict(lr_mult=10.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=max_iters, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=16)
