# The small BoxeR on the harder shapes: objects from 4 pixels up, ten classes.
# Data: python tools/dataset_converters/make_shapes.py --hard --out data/shapes_hard
_base_ = [
    '../_base_/datasets/shapes_instance_hard.py',
    '../_base_/models/boxer_tiny.py',
    '../_base_/schedules/boxer_32e.py',
]

model = dict(bbox_head=dict(num_classes=10))
train_dataloader = dict(batch_size=8)
