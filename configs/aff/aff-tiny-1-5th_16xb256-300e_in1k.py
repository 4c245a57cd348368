_base_ = './aff-tiny_16xb256-300e_in1k.py'

model = dict(backbone=dict(arch='tiny_1_5th'))
