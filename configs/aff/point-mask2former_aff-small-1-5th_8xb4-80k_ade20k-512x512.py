_base_ = './point-mask2former_aff-small_8xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(arch='small_1_5th'))
