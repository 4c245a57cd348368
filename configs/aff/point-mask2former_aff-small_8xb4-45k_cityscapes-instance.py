_base_ = './point-mask2former_aff-tiny_8xb4-45k_cityscapes-instance.py'

model = dict(
    backbone=dict(arch='small'),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)
