_base_ = './point-mask2former_aff-tiny_8xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='mini', drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 128, 256, 384]),
)
