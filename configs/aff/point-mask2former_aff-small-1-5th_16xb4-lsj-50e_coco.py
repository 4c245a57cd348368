_base_ = './point-mask2former_aff-small_16xb4-lsj-50e_coco.py'

model = dict(backbone=dict(arch='small_1_5th'))
