_base_ = [
    '../_base_/datasets/coco_category_id_instance.py',
    '../_base_/models/boxer_r50_mask.py',
    '../_base_/schedules/boxer_3x.py',
]
