_base_ = './point-mask2former_aff-tiny_8xb4-45k_cityscapes-instance.py'

model = dict(
    backbone=dict(arch='mini', drop_path_rate=0.0),
    panoptic_head=dict(in_channels=[32, 128, 256, 384]),
)
