"""The dataset whose labels are category ids."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from mmdet.datasets import CocoDataset

from boltz_mm.datasets.checked_coco import DatasetError
from boltz_mm.datasets.coco_category_id import CocoCategoryIdDataset
from tests.datasets.coco_files import coco_content, write_coco

NAMES = ('person', 'bicycle', 'airplane')  # what COCO calls the ids 1, 2 and 5


def _dataset(folder: Path, content: dict | None = None, **options) -> CocoCategoryIdDataset:
    write_coco(folder, coco_content(NAMES, (1, 2, 5)) if content is None else content)
    options = dict(data_root=str(folder), ann_file='instances.json', data_prefix=dict(img=''), pipeline=[]) | options
    return CocoCategoryIdDataset(**options)


def test_metainfo_has_a_name_at_every_category_id():
    meta = CocoCategoryIdDataset.METAINFO
    assert len(meta['classes']) == len(meta['palette']) == 91
    assert isinstance(meta['palette'], list), 'mmdet draws all classes in one colour from a tuple, and fails'
    assert [meta['classes'][i] for i in (1, 11, 13, 25, 27, 82, 84, 90)] == [
        'person', 'fire hydrant', 'stop sign', 'giraffe', 'backpack', 'refrigerator', 'book', 'toothbrush',
    ]  # fmt: skip
    used = [name for name in meta['classes'] if not name.startswith('unused')]
    assert used == list(CocoDataset.METAINFO['classes'])
    assert len(set(meta['classes'])) == 91


def test_labels_are_category_ids(tmp_path):
    dataset = _dataset(tmp_path)
    labels = [[instance['bbox_label'] for instance in dataset.get_data_info(i)['instances']] for i in range(5)]
    assert labels == [[1, 2], [5], [], [1, 2, 2], [5]]
    assert dataset.cat_ids == [1, 2, 5]


def test_crowds_and_boxes_without_area_are_dropped_and_boxes_clipped(tmp_path):
    dataset = _dataset(tmp_path)
    assert [i['ann_id'] for i in dataset.get_data_info(1)['instances']] == [103]
    assert dataset.get_data_info(3)['instances'][0]['bbox'] == [0, 0, 5, 5]


def test_corners_are_added_in_float32(tmp_path):
    content = coco_content(NAMES, (1, 2, 5))
    x, width = 16.88, 7.06  # the sum in float64, rounded, is another float32
    content['annotations'][0]['bbox'] = [x, 6, width, 12]
    x2 = _dataset(tmp_path, content).get_data_info(0)['instances'][0]['bbox'][2]
    assert x2 == float(np.float32(x) + np.float32(width)) != float(np.float32(x + width))


def test_images_without_objects_stay(tmp_path):
    assert len(_dataset(tmp_path, filter_cfg=dict(filter_empty_gt=False))) == 5


def test_category_beyond_the_classes_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"instances\.json: category 91 \('x'\) is beyond the 91 classes"):
        _dataset(tmp_path, coco_content(('person', 'bicycle', 'x'), (1, 2, 91)))


def test_category_of_another_name_is_named(tmp_path):
    with pytest.raises(DatasetError, match="category 2 is 'cat' in the file and 'bicycle' in metainfo"):
        _dataset(tmp_path, coco_content(('person', 'cat', 'airplane'), (1, 2, 5)))


def test_own_names(tmp_path):
    names = ('none', 'a', 'b', 'none 3', 'c')
    dataset = _dataset(tmp_path, coco_content(('a', 'b', 'c'), (1, 2, 4)), metainfo=dict(classes=names))
    assert dataset.get_data_info(1)['instances'][0]['bbox_label'] == 4


@pytest.mark.skipif('BOLTZ_MM_COCO100' not in os.environ, reason='BOLTZ_MM_COCO100 is not set')
def test_real_images():
    root = Path(os.environ['BOLTZ_MM_COCO100'])
    dataset = CocoCategoryIdDataset(
        data_root=str(root),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=[
            dict(type='LoadImageFromFile', imdecode_backend='pillow'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='mmdet.PackDetInputs'),
        ],
    )
    content = json.loads((root / 'annotations/instances_train2017.json').read_text())
    plain = [a for a in content['annotations'] if not a['iscrowd'] and min(a['bbox'][2:]) > 0]
    samples = [dataset[i]['data_samples'].gt_instances for i in range(len(dataset))]
    assert sum(map(len, samples)) == len(plain)
    labels = [label for sample in samples for label in sample.labels.tolist()]
    assert sorted(labels) == sorted(a['category_id'] for a in plain)
    assert all(sample.masks.masks.any(axis=(1, 2)).all() for sample in samples)
