_base_ = './point-mask2former_aff-tiny_8xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(arch='tiny_1_5th'))
