"""Annotation files and images that are fine, odd, or broken: a sample, or one error that says where."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from boltz_mm.datasets.checked_coco import CheckedCOCO, CheckedCocoDataset, DatasetError, check_coco
from boltz_mm.registry import DATASETS
from tests.datasets.coco_files import SIZE, coco_content, write_coco, write_images

CLASSES = ('person', 'bicycle', 'street sign')
PIPELINE = [
    dict(type='LoadImageFromFile', color_type='color_ignore_orientation', imdecode_backend='pillow'),
    dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='boltz_mm.BoxeRResize', size=15),
    dict(type='mmdet.PackDetInputs'),
]


def _dataset(folder: Path, content: Any = None, **options: Any) -> CheckedCocoDataset:
    if content is not None:
        (folder / 'instances.json').write_text(json.dumps(content))
    config = dict(
        type='boltz_mm.CheckedCocoDataset',
        data_root=str(folder),
        ann_file='instances.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=CLASSES),
        pipeline=PIPELINE,
        serialize_data=False,  # serialising collects garbage, which takes longer than everything else here
    )
    return DATASETS.build({**config, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_coco(tmp_path)
    return tmp_path


def test_samples(folder):
    dataset = _dataset(folder)
    assert len(dataset) == 5
    assert dataset.cat_ids == [1, 2, 4]
    instances = [sample['data_samples'].gt_instances for sample in dataset]
    assert [len(i) for i in instances] == [2, 1, 0, 1, 1]
    assert [i.labels.tolist() for i in instances] == [[0, 1], [2], [], [0], [2]]
    # Halved by the resizing; the third box was clipped, the last one is thinner than a pixel.
    boxes = [i.bboxes.tensor.tolist() for i in instances]
    assert boxes[0][0] == [2.5, 3, 7.5, 9]
    assert boxes[3][0] == [0, 0, 2.5, 2.5]
    assert boxes[4][0] == [0.125, 0.25, 0.375, 0.5]
    assert instances[0].masks.masks.shape == (2, 15, 20)
    # Annotations 107 and 108 have no usable polygon; LoadAnnotations ignores them.
    assert len(dataset[3]['data_samples'].ignored_instances) == 2


def test_annotation_ids_and_areas_stay_with_the_instances(folder):
    info = _dataset(folder).get_data_info(0)
    assert [(i['ann_id'], i['area']) for i in info['instances']] == [(100, 120), (101, 120)]


def test_empty_images_can_be_left_out(folder):
    assert len(_dataset(folder, filter_cfg=dict(filter_empty_gt=True))) == 4


def test_a_file_without_annotations_is_valid(folder):
    content = coco_content()
    del content['annotations']
    assert [len(sample['data_samples'].gt_instances) for sample in _dataset(folder, content)] == [0] * 5


def test_missing_area_and_crowd_flag_are_filled_in():
    content = coco_content()
    for annotation in content['annotations']:
        del annotation['area'], annotation['iscrowd']
    assert check_coco(content)['annotations'][0] | {'segmentation': 0} == {
        'id': 100, 'image_id': 1, 'category_id': 1, 'bbox': [5, 6, 10, 12], 'segmentation': 0, 'iscrowd': 0,
        'area': 120,
    }  # fmt: skip


def _at(path: list[Any], value: Any):
    def change(content: dict) -> None:
        *parents, last = path
        for key in parents:
            content = content[key]
        if value is KeyError:
            del content[last]
        else:
            content[last] = value

    return change


FIRST = ['annotations', 0]


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        (['images'], KeyError, "'images' has to be a list"),
        (['categories'], {}, "'categories' has to be a list, got {}"),
        (['annotations'], None, "'annotations' has to be a list, got None"),
        (['images', 1], 7, 'image at position 1: expected a dictionary, got 7'),
        (['images', 1, 'id'], KeyError, 'image at position 1: needs an id'),
        (['images', 1, 'id'], 1, 'image 1: the id is used twice'),
        (['images', 1, 'file_name'], KeyError, 'image 2: file_name'),
        (['images', 1, 'height'], KeyError, 'image 2: height has to be an integer .* got None'),
        (['images', 1, 'width'], 0, 'image 2: width .* got 0'),
        (['images', 1, 'width'], 40.5, 'image 2: width .* got 40.5'),
        (['images', 1, 'width'], 10**400, 'image 2: width'),
        (['categories', 0, 'id'], 'one', "category 'one'"),
        (['categories', 0, 'name'], 3, 'category 1'),
        (['categories', 0, 'name'], 'bicycle', 'same name'),
        ([*FIRST, 'id'], 101, 'annotation 101: the id is used twice'),
        ([*FIRST, 'id'], None, 'annotation at position 0: needs an id'),
        ([*FIRST, 'image_id'], 77, 'image 77, annotation 100: the image is not listed'),
        ([*FIRST, 'image_id'], [1], 'annotation 100: the image is not listed'),
        ([*FIRST, 'category_id'], 3, 'image 1, annotation 100: unknown category 3'),
        ([*FIRST, 'category_id'], KeyError, 'annotation 100: unknown category None'),
        ([*FIRST, 'bbox'], KeyError, 'image 1, annotation 100: bbox has to be 4 finite numbers, got None'),
        ([*FIRST, 'bbox'], [1, 2, 3], 'bbox'),
        ([*FIRST, 'bbox'], [1, 2, 3, float('nan')], 'bbox .* got .*nan'),
        ([*FIRST, 'bbox'], [1, 2, 3, 10**400], 'bbox'),
        ([*FIRST, 'bbox'], [1, 2, 3, '4'], 'bbox'),
        ([*FIRST, 'area'], 'big', "annotation 100: area .* got 'big'"),
        ([*FIRST, 'iscrowd'], 2, 'annotation 100: iscrowd .* got 2'),
    ],
)
def test_broken_structure_is_named_when_the_file_is_read(folder, path, value, message):
    content = coco_content()
    _at(path, value)(content)
    with pytest.raises(DatasetError, match=message) as caught:
        _dataset(folder, content)
    assert 'instances.json' in str(caught.value)


@pytest.mark.parametrize(
    ('segmentation', 'message'),
    [
        ('abc', 'has to be polygons or run lengths'),
        ([[1, 2, float('nan'), 4, 5, 6]], 'list of coordinates'),
        ([[1, 2, 1e300, 4, 5, 6]], 'list of coordinates'),
        ([[1, 2, '3', 4, 5, 6]], 'list of coordinates'),
        ([1, 2, 3, 4, 5, 6], 'list of coordinates'),
        ({'size': [40, 30], 'counts': [1200]}, r'size has to be \[30, 40\]'),
        ({'size': [30, 40], 'counts': [1199]}, 'add up to 1199'),
        ({'size': [30, 40], 'counts': [-1, 1201]}, 'lengths in 0..1200'),
        ({'size': [30, 40], 'counts': 5}, 'a list or a string'),
        ({'size': [30, 40], 'counts': 'nonsense'}, 'broken run lengths'),
        ({'size': [30, 40]}, 'a list or a string'),
    ],
)
def test_broken_segmentation_is_named_when_the_image_is_taken(folder, segmentation, message):
    content = coco_content()
    content['annotations'][1]['segmentation'] = segmentation
    dataset = _dataset(folder, content)
    assert dataset[1]
    with pytest.raises(DatasetError, match=rf'1\.png \(image 1 of .*annotation 101: .*{message}'):
        dataset[0]


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"images": []}', '\x00', '[' * 100000, '{"a": 1e5}'])
def test_what_is_no_annotation_file_is_refused(folder, text):
    (folder / 'instances.json').write_text(text)
    with pytest.raises(DatasetError, match=r'instances\.json'):
        _dataset(folder)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r'instances\.json: the annotation file cannot be read: No such file'):
        _dataset(tmp_path)


@pytest.mark.parametrize(
    'classes', [('person', 'bicycle', 'cat'), ('bicycle', 'person', 'street sign'), ('person', 'bicycle', 'street')]
)
def test_classes_that_would_be_misnumbered_are_refused(folder, classes):
    with pytest.raises(DatasetError, match=r'instances\.json: the classes of metainfo'):
        _dataset(folder, metainfo=dict(classes=classes))


def test_a_part_of_the_classes_is_fine(folder):
    dataset = _dataset(folder, metainfo=dict(classes=('bicycle', 'street sign')))
    assert [dataset[i]['data_samples'].gt_instances.labels.tolist() for i in (0, 1)] == [[0], [1]]


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P', '1', 'LA', 'I;16', 'CMYK', 'YCbCr'])
def test_kinds_of_images_load_or_are_named(folder, mode):
    kind = 'JPEG' if mode in ('CMYK', 'YCbCr') else 'PNG'  # a wrong suffix does not matter
    Image.new(mode, SIZE[::-1]).save(folder / '1.png', kind)
    try:
        sample = _dataset(folder)[0]
    except DatasetError as error:
        assert '1.png' in str(error)
        assert mode == 'I;16'
    else:
        assert sample['inputs'].shape == (3, 15, 20)


def _truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, 'JPEG')
    path.write_bytes(path.read_bytes()[:700])


def _other_size(path: Path) -> None:
    Image.new('RGB', SIZE).save(path)


@pytest.mark.parametrize(
    'spoil',
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b''),
        lambda path: path.write_bytes(b'GIF89a'),
        _truncated,
        _other_size,
    ],
    ids=['missing', 'empty', 'rubbish', 'truncated', 'other size'],
)
def test_bad_images_are_named(folder, spoil):
    spoil(folder / '1.png')
    with pytest.raises(DatasetError, match=r'1\.png \(image 1 of .*instances\.json\)'):
        _dataset(folder)[0]


def test_errors_of_worker_processes_keep_their_kind_and_text(folder):
    (folder / '1.png').unlink()
    loader = torch.utils.data.DataLoader(_dataset(folder), num_workers=1, collate_fn=list)
    with pytest.raises(DatasetError, match=r'1\.png \(image 1 of'):
        next(iter(loader))


def test_file_names_are_relative_to_the_root_without_a_prefix(folder):
    assert _dataset(folder, data_prefix={})[0]


def test_orientation_flag_is_ignored_like_the_official_code_does(folder):
    image = Image.open(folder / '1.png').convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / '1.png', exif=exif)
    dataset = _dataset(folder, pipeline=PIPELINE[:1])
    np.testing.assert_array_equal(dataset[0]['img'][..., ::-1], np.array(image))


def test_names_of_any_language_and_absolute_paths(folder):
    content = coco_content()
    (folder / '1.png').rename(folder / 'größe 图.png')
    content['images'][0]['file_name'] = 'größe 图.png'
    content['images'][1]['file_name'] = str(folder / '2.png')
    assert all(_dataset(folder, content))


def test_empty_results_are_valid_results(folder):
    coco = CheckedCOCO(str(folder / 'instances.json'))
    assert coco.loadRes([]).getAnnIds() == []
    assert len(coco.loadRes([{'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 1, 1], 'score': 1}]).getAnnIds()) == 1


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


# What a mutation puts in the place of a value.
STRANGE = [
    None, True, -1, 0, 3.5, 10**30, 10**400, -(10**30), float('nan'), float('inf'), 1e308, '', 'x', '\x00', [], [[]],
    {}, [0], {'id': 1}, [[1, 2, 3, 4, 5, 6]], [1, 2, 3, 4],
    {'counts': 'x', 'size': [30, 40]}, '../..', [None] * 6, 2**63,
]  # fmt: skip


def _mutate(content: dict, generator: random.Random) -> None:
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        *parents, last = generator.choice(_places(content))
        parent: Any = content
        for key in parents:
            parent = parent[key]
        action = generator.choice(['delete', 'replace', 'replace', 'replace', 'wrap', 'double'])
        if action == 'delete':
            del parent[last]
        elif action == 'replace':
            parent[last] = copy.deepcopy(generator.choice(STRANGE))
        elif action == 'wrap':
            parent[last] = [parent[last]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))


def test_five_hundred_mutated_files_give_samples_or_the_one_error(tmp_path):
    write_images(tmp_path)
    generator = random.Random(0)
    outcomes = {'read': 0, 'refused': 0, 'sample refused': 0}
    for case in range(500):
        content = coco_content()
        _mutate(content, generator)
        try:
            dataset = _dataset(tmp_path, content)
        except DatasetError as error:
            outcomes['refused'] += 1
            assert 'instances.json' in str(error), case
            continue
        for index in range(len(dataset)):
            try:
                assert 'inputs' in dataset[index]
                outcomes['read'] += 1
            except DatasetError as error:
                outcomes['sample refused'] += 1
                assert '(image ' in str(error), case
    assert min(outcomes.values()) > 20, outcomes
