_base_ = './point-mask2former_aff-tiny_16xb4-lsj-50e_coco.py'

model = dict(
    backbone=dict(arch='small'),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)
