_base_ = [
    '../_base_/pretrain_runtime.py',
    '../_base_/models/aff_cls.py',
    '../_base_/datasets/imagenet_aff.py',
    '../_base_/schedules/aff_in1k.py',
]
