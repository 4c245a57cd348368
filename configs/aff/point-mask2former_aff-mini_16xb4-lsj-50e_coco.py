_base_ = './point-mask2former_aff-tiny_16xb4-lsj-50e_coco.py'

model = dict(
    backbone=dict(arch='mini', drop_path_rate=0.0),
    panoptic_head=dict(in_channels=[32, 128, 256, 384]),
)
