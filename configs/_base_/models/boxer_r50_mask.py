# BoxeR-2D for boxes and masks: instance attention in the decoder.
_base_ = './boxer_r50.py'

model = dict(
    decoder=dict(layer_cfg=dict(with_mask=True, residual_mode='v1')),
    bbox_head=dict(
        with_mask=True,
        loss_mask=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=5.0),
        loss_dice=dict(type='DiceLoss', use_sigmoid=True, activate=True, naive_dice=True, eps=1.0, loss_weight=5.0),
    ),
)
