# ImageNet-22K.  The official repository has the recipe but no code for this data; 21,841 classes are an assumption.
_base_ = './aff-tiny_16xb256-300e_in1k.py'

model = dict(
    backbone=dict(arch='base'),
    head=dict(num_classes=21841, in_channels=1024),
)

train_dataloader = dict(dataset=dict(type='ImageNet21k', data_root='data/imagenet21k', split='train'))
# There is no validation set of it.
val_dataloader = None
test_dataloader = None
val_evaluator = None
test_evaluator = None
val_cfg = None
test_cfg = None

max_epochs = 90
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(
        type='boltz_mm.WarmupCosineLR',
        warmup=5,
        total=max_epochs,
        start_ratio=2.5e-4,
        min_ratio=2.5e-3,
        convert_to_iter_based=True,
    )
]
