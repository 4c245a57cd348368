_base_ = './point-mask2former_aff-tiny_16xb4-lsj-50e_coco.py'

model = dict(backbone=dict(arch='tiny_1_5th'))
