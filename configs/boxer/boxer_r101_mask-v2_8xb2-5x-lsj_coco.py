# The second way to update mask features, without a feed-forward network on them; official weights exist for this one.
_base_ = './boxer_r101_mask_8xb2-5x-lsj_coco.py'

model = dict(decoder=dict(layer_cfg=dict(residual_mode='v2')))
