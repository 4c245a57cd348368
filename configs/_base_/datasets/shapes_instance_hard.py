# The harder embedded dataset: ten classes, objects from 4 pixels up, crowded, low contrast.
# Made by: python tools/dataset_converters/make_shapes.py --out data/shapes_hard --hard
_base_ = './shapes_instance.py'

data_root = 'data/shapes_hard/'
metainfo = dict(
    classes=('circle', 'square', 'triangle', 'star', 'ring', 'cross', 'bar', 'crescent', 'heart', 'arrow'),
    palette=[
        (220, 20, 60), (0, 110, 230), (40, 170, 60), (250, 170, 30), (150, 60, 200),
        (0, 180, 190), (240, 100, 170), (120, 90, 30), (255, 80, 0), (90, 90, 250),
    ],
)  # fmt: skip

train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
