# A small AutoFocusFormer with Mask2Former on the embedded dataset, instances; trains on a CPU in minutes.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/point-mask2former_aff_tiny.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/aff_shapes_seg.py',
]

train_dataloader = dict(batch_size=8)
val_evaluator = dict(metric='segm')
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=2, save_best='coco/segm_mAP'))
