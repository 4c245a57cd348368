"""Panoptic datasets in COCO's layout, read with checks and without ``panopticapi``.

A picture of ids (id = R + 256 G + 65536 B, 0 is void) goes with each image, and a list of its segments.  mmdet's
``LoadPanopticAnnotations`` and ``CocoPanopticMetric`` need the package ``panopticapi``, which no package index has; the
classes here and ``boltz_mm.CocoPanopticQualityMetric`` do not.

Training targets are those of the official AutoFocusFormer (``mask_former_panoptic_dataset_mapper.py``): one mask for
every segment, of things and stuff, in the order of the file and without crowds.  See
:class:`boltz_mm.datasets.transforms.panoptic.PanopticSegmentsToInstances`.
"""

import os.path as osp
from typing import Any

import mmcv
import numpy as np
from mmdet.datasets import CocoPanopticDataset
from mmengine.fileio import get

from boltz_mm.datasets.checked_coco import (
    CheckedCOCO,
    CheckedCocoDataset,
    DatasetError,
    check_images_and_categories,
    is_key,
    read_checked_json,
    short,
)
from boltz_mm.registry import DATASETS

MAX_SEGMENT_ID = 256**3 - 1


def rgb2id(picture: np.ndarray) -> np.ndarray:
    """Segment ids of a panoptic picture.

    Args:
        picture: uint8 ``[H, W, 3]``, RGB.

    Returns:
        int32 ``[H, W]``.
    """
    red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """The panoptic picture, uint8 ``[H, W, 3]`` (RGB), of segment ids ``[H, W]`` in 0..2^24 - 1."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def read_segment_ids(path: str, backend_args: dict | None = None) -> np.ndarray:
    """The segment ids, int32 ``[H, W]``, of a panoptic picture.

    Raises:
        DatasetError: The picture cannot be read; the message names it.
    """
    try:
        picture = mmcv.imfrombytes(get(path, backend_args=backend_args), 'color')
    except OSError as error:
        raise DatasetError(f'{path}: the picture of ids cannot be read: {error.strerror or error}') from error
    if picture is None:
        raise DatasetError(f'{path}: the picture of ids is broken')
    return rgb2id(picture[..., ::-1])


class CheckedPanopticCOCO(CheckedCOCO):
    """The segments of a panoptic annotation file by image.

    ``imgToAnns`` holds the segments of an image; an annotated image has ``segm_file``, the name of its picture of ids.

    Args:
        annotation_file: Path of the annotation file.

    Raises:
        DatasetError: The file is missing, is not JSON, or its contents are not in COCO's panoptic layout.
    """

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        if annotation_file is not None:
            self.dataset = read_checked_json(annotation_file, check_panoptic)
            self.createIndex()

    def createIndex(self) -> None:  # noqa: N802  pycocotools' name
        """Make the tables by id."""
        self.imgs = {image['id']: image for image in self.dataset['images']}
        self.cats = {category['id']: category for category in self.dataset['categories']}
        self.imgToAnns: dict[int, list[dict]] = {number: [] for number in self.imgs}
        self.catToImgs: dict[int, list[int]] = {number: [] for number in self.cats}
        for annotation in self.dataset['annotations']:
            number = annotation['image_id']
            self.imgToAnns[number] = annotation['segments_info']
            self.imgs[number]['segm_file'] = annotation['file_name']
            for segment in annotation['segments_info']:
                self.catToImgs[segment['category_id']].append(number)
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def check_panoptic(content: Any) -> dict[str, Any]:
    """Check the structure of a COCO panoptic dictionary; a missing ``iscrowd`` is filled in (0).

    Raises:
        DatasetError: With the id of the image and the segment.
    """
    images, categories = check_images_and_categories(content)
    for number, category in categories.items():
        if category.get('isthing') not in (0, 1):
            raise DatasetError(f'category {number}: isthing has to be 0 or 1, got {short(category.get("isthing"))}')
    seen = set()
    for position, annotation in enumerate(content['annotations']):
        if not isinstance(annotation, dict) or not is_key(annotation.get('image_id')):
            raise DatasetError(f'annotation at position {position}: needs an image_id, got {short(annotation)}')
        number = annotation['image_id']
        if number not in images:
            raise DatasetError(f'image {number!r}: the image is not listed in the file')
        if number in seen:
            raise DatasetError(f'image {number!r}: has two annotations')
        seen.add(number)
        if not isinstance(annotation.get('file_name'), str) or not annotation['file_name']:
            raise DatasetError(f'image {number!r}: the annotation needs the file_name of its picture of ids')
        if not isinstance(annotation.get('segments_info'), list):
            raise DatasetError(f'image {number!r}: segments_info has to be a list')
        _check_segments(number, annotation['segments_info'], categories)
    return content


def _check_segments(image_id: Any, segments: list[Any], categories: dict[Any, Any]) -> None:
    seen = set()
    for position, segment in enumerate(segments):
        number = segment.get('id') if isinstance(segment, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= MAX_SEGMENT_ID:
            where = f'image {image_id!r}, segment at position {position}'
            raise DatasetError(f'{where}: needs an id in 1..{MAX_SEGMENT_ID}, got {short(segment)}')
        where = f'image {image_id!r}, segment {number}'
        if number in seen:
            raise DatasetError(f'{where}: the id is used twice in the image')
        seen.add(number)
        category = segment.get('category_id')
        if not is_key(category) or category not in categories:
            raise DatasetError(f'{where}: unknown category {short(category)}')
        if segment.setdefault('iscrowd', 0) not in (0, 1):
            raise DatasetError(f'{where}: iscrowd has to be 0 or 1, got {short(segment["iscrowd"])}')


def labels_of_categories(metainfo: dict[str, Any], categories: list[dict[str, Any]]) -> dict[int, int]:
    """Labels (positions in ``metainfo['classes']``) by category id, matched by name.

    Raises:
        DatasetError: A class is not in the file, or is a thing in one place and stuff in the other.
    """
    known = {category['name']: category for category in categories}
    labels = {}
    for label, name in enumerate(metainfo['classes']):
        if name not in known:
            raise DatasetError(f'no category of the file is named {name!r}, as a class of metainfo is')
        category, is_thing = known[name], name in metainfo['thing_classes']
        if bool(category['isthing']) != is_thing:
            raise DatasetError(f'category {category["id"]} ({name!r}): isthing and thing_classes of metainfo disagree')
        labels[category['id']] = label
    return labels


@DATASETS.register_module()
class CheckedCocoPanopticDataset(CheckedCocoDataset, CocoPanopticDataset):
    """mmdet's ``CocoPanopticDataset`` with a checked annotation file and errors that name the image.

    Labels are positions in ``metainfo['classes']``, whose ``thing_classes`` name the things; the order of the file
    does not matter.  Segments of other categories are left out (and become void).

    A sample has ``seg_map_path`` and ``segments_info``: of each segment ``id``, ``category`` (the label), ``is_thing``
    and ``iscrowd``.  It has no ``instances``: masks and boxes are made from the picture of ids after augmentation.

    Raises:
        DatasetError: On reading, for a broken file; on taking a sample, for a broken, missing or differently sized
            image or picture of ids.
    """

    COCOAPI = CheckedPanopticCOCO

    def load_data_list(self) -> list[dict]:
        """Read the file; images without annotation are left out unless this is a test."""
        data_list = super().load_data_list()
        return data_list if self.test_mode else [info for info in data_list if info['segments_info']]

    def _labels(self, categories: list[dict]) -> dict[int, int]:
        self._isthing = {category['id']: bool(category['isthing']) for category in categories}
        return labels_of_categories(self.metainfo, categories)

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """One image with its segments."""
        image, segments = raw_data_info['raw_img_info'], raw_data_info['raw_ann_info']
        seg_prefix, segm_file = self.data_prefix.get('seg'), image.get('segm_file')
        return {
            'img_path': osp.join(self.data_prefix['img'], self.image_file(image)),
            'img_id': image['img_id'],
            'height': image['height'],
            'width': image['width'],
            'seg_map_path': osp.join(seg_prefix, segm_file) if seg_prefix and segm_file else None,
            'instances': [],
            'segments_info': [
                {
                    'id': segment['id'],
                    'category': self.cat2label[segment['category_id']],
                    'is_thing': self._isthing[segment['category_id']],
                    'iscrowd': segment['iscrowd'],
                }
                for segment in segments
                if segment['category_id'] in self.cat2label
            ],
        }

    def image_file(self, image: dict) -> str:
        """Name of the image below ``data_prefix['img']``."""
        return image['file_name']
