# From the weights of aff-base_16xb256-90e_in22k: set load_from.  Four batches make an update.
_base_ = [
    '../_base_/pretrain_runtime.py',
    '../_base_/models/aff_cls.py',
    '../_base_/datasets/imagenet_aff_384.py',
    '../_base_/schedules/aff_in1k_finetune.py',
]

model = dict(backbone=dict(arch='base_384'), head=dict(in_channels=1024))
optim_wrapper = dict(accumulative_counts=4)
