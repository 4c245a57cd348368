"""Panoptic files: labels by name, targets of every segment, one clear error for what is broken."""

import json

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image

from boltz_mm.datasets.checked_coco import DatasetError
from boltz_mm.datasets.coco_panoptic import id2rgb, rgb2id
from boltz_mm.registry import DATASETS
from tests.datasets.panoptic_files import CAT, CROWD, DOG, METAINFO, SKY, panoptic_content, panoptic_ids, write_panoptic

LOAD = [dict(type='LoadImageFromFile'), dict(type='boltz_mm.LoadPanopticSegments')]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def _dataset(folder, content=None, middle=(), keep_empty=True, **kwargs):
    last = [dict(type='boltz_mm.PanopticSegmentsToInstances', keep_empty=keep_empty), dict(type='PackDetInputs')]
    options = dict(metainfo=METAINFO, data_prefix=dict(img='', seg=''), pipeline=LOAD + list(middle) + last) | kwargs
    write_panoptic(folder, content)
    return DATASETS.build(
        dict(type='boltz_mm.CheckedCocoPanopticDataset', data_root=str(folder), ann_file='panoptic.json', **options)
    )


def test_ids_and_colours_are_inverse():
    ids = np.array([[0, 1, 255, 256, 65535, 65536, 2**24 - 1]])
    np.testing.assert_array_equal(rgb2id(id2rgb(ids)), ids)
    np.testing.assert_array_equal(id2rgb(ids)[0, 3], [0, 1, 0])


def test_every_segment_but_crowds_is_a_target_in_the_order_of_the_file(tmp_path):
    dataset = _dataset(tmp_path)
    assert len(dataset) == 2  # the image without annotation is no training image
    truth = dataset[0]['data_samples'].gt_instances
    assert truth.labels.tolist() == [1, 2, 0]
    assert len(dataset[0]['data_samples'].ignored_instances) == 0
    ids = panoptic_ids()
    np.testing.assert_array_equal(truth.masks.masks, np.stack([ids == number for number in (DOG, SKY, CAT)]))
    assert truth.bboxes.tensor.tolist() == [[10, 9, 18, 15], [0, 0, 24, 19], [3, 2, 9, 8]]
    assert 'gt_sem_seg' not in dataset[0]['data_samples']


def test_augmentation_acts_on_the_ids(tmp_path):
    middle = [
        dict(type='Resize', scale=(48, 40)),
        dict(type='RandomFlip', prob=1.0),
        dict(type='RandomCrop', crop_size=(16, 16), crop_type='absolute', allow_negative_crop=True),
        dict(type='Pad', size=(20, 20), pad_val=dict(img=128, seg=0)),
    ]
    np.random.seed(3)
    truth = _dataset(tmp_path, middle=middle)[0]['data_samples'].gt_instances
    assert truth.masks.masks.shape == (3, 20, 20) and not truth.masks.masks[:, 16:].any()
    empty = truth.masks.masks.sum((1, 2)) == 0
    assert empty.any() and not empty.all()
    np.random.seed(3)
    kept = _dataset(tmp_path, middle=middle, keep_empty=False)[0]['data_samples'].gt_instances
    np.testing.assert_array_equal(kept.masks.masks, truth.masks.masks[~empty])
    assert kept.labels.tolist() == truth.labels[torch.from_numpy(~empty)].tolist()


def test_no_segment_left_gives_no_target(tmp_path):
    content = panoptic_content()
    for annotation in content['annotations']:
        annotation['segments_info'] = [one for one in annotation['segments_info'] if one['id'] == CROWD]
    truth = _dataset(tmp_path, content)[0]['data_samples'].gt_instances
    assert truth.masks.masks.shape == (0, 20, 24) and truth.bboxes.tensor.shape == (0, 4)


def _edit(annotation: int | None = None, **change):
    """A broken file: keys of an annotation (or of the second of its segments) or of the whole changed."""

    def edit(content):
        if annotation is None:
            return content | change
        target = content['annotations'][annotation]
        for key, value in change.items():
            (target if key in target else target['segments_info'][1])[key] = value
        return content

    return edit


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (_edit(0, id=DOG), f'image 1, segment {DOG}: the id is used twice'),
        (_edit(0, id=0), 'image 1, segment at position 1: needs an id'),
        (_edit(1, id=2**24), 'image 2, segment at position 1: needs an id'),
        (_edit(1, category_id=4), f'image 2, segment {SKY}: unknown category 4'),
        (_edit(1, iscrowd='no'), f'image 2, segment {SKY}: iscrowd'),
        (_edit(1, image_id=1), 'image 1: has two annotations'),
        (_edit(1, image_id=4), 'image 4: the image is not listed'),
        (_edit(1, file_name=None), 'image 2: the annotation needs the file_name'),
        (_edit(1, segments_info={}), 'image 2: segments_info has to be a list'),
        (_edit(annotations=[3]), 'annotation at position 0'),
        (_edit(categories=[{'id': 2, 'name': 'sky'}]), 'category 2: isthing has to be 0 or 1'),
        (_edit(categories=[{'id': 2, 'name': 'sky', 'isthing': 0}], annotations=[]), "named 'cat'"),
    ],
)
def test_broken_files_name_file_and_id(tmp_path, edit, message):
    with pytest.raises(DatasetError, match=message) as caught:
        _dataset(tmp_path, edit(panoptic_content()))
    assert 'panoptic.json' in str(caught.value)


def test_thing_and_stuff_have_to_agree(tmp_path):
    with pytest.raises(DatasetError, match=r"category 8 \('dog'\): isthing"):
        _dataset(tmp_path, metainfo=METAINFO | {'thing_classes': ('cat',)})


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (lambda path: path.unlink(), 'cannot be read'),
        (lambda path: path.write_bytes(b'no picture'), 'is broken'),
        (lambda path: Image.new('RGB', (24, 21)).save(path), '24 x 21 .* the image 24 x 20'),
        (lambda path: Image.new('RGB', (24, 20)).save(path), f'none of the segments, such as {DOG}'),
    ],
)
def test_broken_pictures_name_file_and_image(tmp_path, write, message):
    dataset = _dataset(tmp_path)
    write(tmp_path / 'ids_2.png')
    assert len(dataset[0]['data_samples'].gt_instances) == 3
    with pytest.raises(DatasetError, match=message) as caught:
        dataset[1]
    assert all(text in str(caught.value) for text in ('2.jpg', 'image 2 of', 'ids_2.png'))


def test_cityscapes_images_lie_in_the_folder_of_their_city(tmp_path):
    content = panoptic_content()
    things = ('person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle')
    classes = DATASETS.get('boltz_mm.CityscapesPanopticDataset').METAINFO['classes']
    content['categories'] = [{'id': i, 'name': n, 'isthing': int(n in things)} for i, n in enumerate(classes, start=1)]
    name = 'bad-honnef_000000_000019'
    content['images'] = [dict(content['images'][0], id=name, file_name=f'{name}_gtFine_leftImg8bit.png')]
    content['annotations'] = [dict(content['annotations'][0], image_id=name)]
    (tmp_path / 'panoptic.json').write_text(json.dumps(content))
    dataset = DATASETS.build(
        dict(
            type='boltz_mm.CityscapesPanopticDataset', data_root=str(tmp_path), ann_file='panoptic.json',
            data_prefix=dict(img='leftImg8bit/train/', seg='ids/'), pipeline=[],
        )
    )  # fmt: skip
    info = dataset.get_data_info(0)
    assert info['img_path'].endswith(f'leftImg8bit/train/bad-honnef/{name}_leftImg8bit.png')
    assert info['seg_map_path'].endswith('ids/ids_1.png')
    assert [segment['category'] for segment in info['segments_info']] == [7, 1, 6, 6, 8]
    assert CAT in [segment['id'] for segment in info['segments_info']]
