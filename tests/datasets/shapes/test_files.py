"""The files of a set: valid for COCO's tools and consistent with each other."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from boltz_mm.datasets.shapes import (
    STUFF_CLASSES,
    THING_CLASSES,
    instance_metainfo,
    panoptic_metainfo,
    read_manifest,
    semantic_metainfo,
)

from .conftest import COUNTS

SPLITS = list(COUNTS)


def _load(root: Path, kind: str, split: str) -> dict:
    return json.loads((root / f'annotations/{kind}_{split}.json').read_text())


@pytest.fixture(params=SPLITS)
def split(request: pytest.FixtureRequest) -> str:
    return request.param


def test_instances_are_valid_coco(shapes_root: Path, split: str) -> None:
    coco = COCO(shapes_root / f'annotations/instances_{split}.json')
    assert len(coco.imgs) == COUNTS[split]
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(THING_CLASSES[:4])
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 64)
        rows, columns = np.nonzero(mask)
        tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation['bbox'] == tight
        assert annotation['area'] == mask.sum() > 0
        assert isinstance(annotation['segmentation']['counts'], str)
    for image in coco.imgs.values():
        assert coco.getAnnIds(image['id']), 'an image without objects'
        pixels = cv2.imread(str(shapes_root / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)


def test_panoptic_semantic_and_instances_agree(shapes_root: Path, split: str) -> None:
    coco = COCO(shapes_root / f'annotations/instances_{split}.json')
    panoptic = _load(shapes_root, 'panoptic', split)
    assert [c['isthing'] for c in panoptic['categories']] == [1] * 4 + [0] * len(STUFF_CLASSES)
    for entry in panoptic['annotations']:
        blue, green, red = np.moveaxis(
            cv2.imread(str(shapes_root / f'annotations/panoptic_{split}' / entry['file_name'])).astype(int), -1, 0
        )
        ids = red + 256 * green + 65536 * blue
        semantic = cv2.imread(str(shapes_root / 'semantic' / split / entry['file_name']), cv2.IMREAD_UNCHANGED)
        assert semantic.shape == (64, 64)
        assert set(np.unique(ids)) == {s['id'] for s in entry['segments_info']}, 'every pixel belongs to a segment'
        instances = coco.loadAnns(coco.getAnnIds(entry['image_id']))
        things = [s for s in entry['segments_info'] if s['category_id'] <= 4]
        assert len(things) == len(instances)
        for segment in entry['segments_info']:
            inside = ids == segment['id']
            assert inside.sum() == segment['area']
            assert (semantic[inside] == segment['category_id'] - 1).all()
        for segment, instance in zip(things, instances, strict=True):
            np.testing.assert_array_equal(ids == segment['id'], coco.annToMask(instance).astype(bool))
            assert segment['category_id'] == instance['category_id']
            assert segment['bbox'] == instance['bbox']


def test_phrases_name_the_objects_that_fit(shapes_root: Path, split: str) -> None:
    instances = {a['id']: a for a in _load(shapes_root, 'instances', split)['annotations']}
    phrases = _load(shapes_root, 'phrases', split)
    assert len(phrases['annotations']) == COUNTS[split]
    seen = set()
    for entry in phrases['annotations']:
        here = [a for a in instances.values() if a['image_id'] == entry['image_id']]
        texts = [p['phrase'] for p in entry['phrases']]
        assert len(texts) == len(set(texts))
        assert {a['attributes']['class'] for a in here} <= set(texts)
        for item in entry['phrases']:
            seen |= set(item['annotation_ids'])
            text, _, place = item['phrase'].partition(' the ')
            words = set(text.split()) - {'in', 'on', 'at'}
            fitting = [
                a['id']
                for a in here
                if words <= set(a['attributes'].values()) and place in ('', a['attributes']['place'])
            ]
            assert item['annotation_ids'] == fitting
            assert fitting
    assert seen == set(instances)


def test_attributes_describe_the_box(shapes_root: Path) -> None:
    for annotation in _load(shapes_root, 'instances', 'train')['annotations']:
        x, y, width, height = annotation['bbox']
        place, longer = annotation['attributes']['place'], max(width, height)
        if x + width < 64 / 3:
            assert 'left' in place
        if y > 2 * 64 / 3:
            assert place in ('lower left', 'bottom', 'lower right')
        assert annotation['attributes']['size'] == ('small' if longer < 8 else 'medium' if longer <= 16 else 'large')


def test_classification_split_is_an_image_folder(shapes_root: Path, split: str) -> None:
    folders = sorted(p.name for p in (shapes_root / 'classification' / split).iterdir())
    assert folders == sorted(THING_CLASSES[:4])
    for folder in folders:
        files = list((shapes_root / 'classification' / split / folder).glob('*.png'))
        assert len(files) == COUNTS[split] // 4


def test_manifest(shapes_root: Path) -> None:
    manifest = read_manifest(shapes_root)
    assert manifest['arguments']['counts'] == COUNTS
    assert set(manifest['sha256']) == set(COUNTS)


def test_metainfo_fits_the_files(shapes_root: Path) -> None:
    panoptic = _load(shapes_root, 'panoptic', 'train')
    names = tuple(c['name'] for c in panoptic['categories'])
    assert panoptic_metainfo(4)['classes'] == semantic_metainfo(4)['classes'] == names
    assert len(panoptic_metainfo(4)['palette']) == len(names)
    assert instance_metainfo(4)['classes'] == names[:4]
    with pytest.raises(ValueError, match='12'):
        instance_metainfo(12)


def test_openmmlab_datasets_read_it(shapes_root: Path) -> None:
    from mmdet.datasets import CocoDataset, CocoPanopticDataset

    # No pipeline: decoding panoptic PNGs there needs panopticapi, which is not on the package indexes.
    panoptic = CocoPanopticDataset(
        data_root=str(shapes_root), ann_file='annotations/panoptic_train.json', metainfo=panoptic_metainfo(4),
        data_prefix={'img': 'train/', 'seg': 'annotations/panoptic_train/'},
    )  # fmt: skip
    segments = panoptic.get_data_info(0)['segments_info']
    things = [s['category'] for s in segments if s['is_thing']]
    assert all(s['category'] >= 4 for s in segments[len(things) :])
    instances = CocoDataset(
        data_root=str(shapes_root), ann_file='annotations/instances_train.json', metainfo=instance_metainfo(4),
        data_prefix={'img': 'train/'},
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'mmdet.LoadAnnotations', 'with_mask': True},
            {'type': 'mmdet.PackDetInputs'},
        ],
    )  # fmt: skip
    assert len(instances) == len(panoptic) == 24
    ours = instances[0]['data_samples'].gt_instances
    assert ours.labels.tolist() == things
    semantic = cv2.imread(str(shapes_root / 'semantic/train/000000000001.png'), cv2.IMREAD_UNCHANGED)
    for label, mask in zip(things, ours.masks.masks.astype(bool), strict=True):
        assert (semantic[mask] == label).all()
    np.testing.assert_array_equal(ours.masks.masks.any(axis=0), semantic < 4)


def test_openmmlab_segmentation_and_classification_read_it(shapes_root: Path) -> None:
    from mmpretrain.datasets import CustomDataset
    from mmseg.datasets import BaseSegDataset

    semantic = BaseSegDataset(
        data_root=str(shapes_root), metainfo=semantic_metainfo(4), img_suffix='.png', seg_map_suffix='.png',
        data_prefix={'img_path': 'train', 'seg_map_path': 'semantic/train'},
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'mmseg.LoadAnnotations'},
            {'type': 'mmseg.PackSegInputs'},
        ],
    )  # fmt: skip
    assert len(semantic) == COUNTS['train']
    labels = semantic[0]['data_samples'].gt_sem_seg.data[0].numpy()
    plain = cv2.imread(str(shapes_root / 'semantic/train/000000000001.png'), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, plain)

    single = CustomDataset(data_root=str(shapes_root / 'classification/train'))
    assert len(single) == COUNTS['train']
    assert sorted(single.CLASSES) == sorted(THING_CLASSES[:4])
    assert np.bincount(single.get_gt_labels()).tolist() == [6] * 4
