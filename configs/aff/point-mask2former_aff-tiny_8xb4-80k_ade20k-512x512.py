_base_ = [
    '../_base_/seg_runtime.py',
    '../_base_/models/point-mask2former_aff_semantic.py',
    '../_base_/datasets/ade20k_aff.py',
    '../_base_/schedules/aff_80k.py',
]
