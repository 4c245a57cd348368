# Model and recipe alone: there is no Waymo data pipeline here.  Give the model lists of point clouds [N, 5], or
# bird's-eye-view maps (see boltz_mm.models.detectors.boxer3d).
_base_ = [
    '../_base_/models/boxer3d_pillars.py',
    '../_base_/schedules/boxer3d_140k.py',
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=140000)
