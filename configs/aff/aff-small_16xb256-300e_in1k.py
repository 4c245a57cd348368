_base_ = './aff-tiny_16xb256-300e_in1k.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
