# From the weights of aff-base_16xb256-90e_in22k: set load_from.
_base_ = [
    '../_base_/pretrain_runtime.py',
    '../_base_/models/aff_cls.py',
    '../_base_/datasets/imagenet_aff.py',
    '../_base_/schedules/aff_in1k_finetune.py',
]

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1024))
train_dataloader = dict(batch_size=64)
