# A small BoxeR with masks on the embedded dataset; trains on a CPU in minutes.
# Data: python tools/dataset_converters/make_shapes.py --out data/shapes
_base_ = [
    '../_base_/datasets/shapes_instance.py',
    '../_base_/models/boxer_tiny.py',
    '../_base_/schedules/boxer_32e.py',
]

model = dict(bbox_head=dict(num_classes=3))
train_dataloader = dict(batch_size=8)
# The run that the README reports.
randomness = dict(seed=265877676)
