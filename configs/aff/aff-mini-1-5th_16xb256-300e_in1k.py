_base_ = './aff-mini_16xb256-300e_in1k.py'

model = dict(backbone=dict(arch='mini_1_5th'))
