_base_ = './point-mask2former_aff-mini_16xb4-lsj-50e_coco.py'

model = dict(backbone=dict(arch='mini_1_5th'))
