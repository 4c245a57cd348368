_base_ = [
    '../_base_/iter_runtime.py',
    '../_base_/models/point-mask2former_aff.py',
    '../_base_/datasets/coco_instance_lsj_aff.py',
    '../_base_/schedules/aff_50e.py',
]

# The interpolation has a fixed exponent here.
model = dict(panoptic_head=dict(pixel_decoder=dict(power=2.0, learnable_power=False)))
