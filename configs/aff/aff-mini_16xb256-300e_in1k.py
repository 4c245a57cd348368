# Without mixing of images, unlike the larger variants.
_base_ = './aff-tiny_16xb256-300e_in1k.py'

model = dict(backbone=dict(arch='mini'), head=dict(in_channels=384), train_cfg=dict(_delete_=True))
