_base_ = './point-mask2former_aff-tiny_8xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
