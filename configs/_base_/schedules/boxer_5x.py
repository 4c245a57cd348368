# 368,750 updates of 16 images, drops at 327,778 and 355,092, strong weight decay.
# The official files ask for a warm-up over 10 updates with factor 1, which changes nothing and is left out.
_base_ = './boxer_3x.py'

optim_wrapper = dict(optimizer=dict(weight_decay=0.05), clip_grad=dict(max_norm=0.01))

train_cfg = dict(max_iters=368750)
param_scheduler = [
    dict(type='MultiStepLR', milestones=[327778, 355092], gamma=0.1, by_epoch=False, begin=0, end=368750),
]
