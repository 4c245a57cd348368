"""COCO annotation files read with checks: a sample, or one error that names the file, the image and the annotation.

mmdet's ``CocoDataset`` reads any file that parses and stops later, often inside a data-loader worker, with an index or
key error; a polygon with a NaN or a huge coordinate can even take the process down inside pycocotools.  The classes
here check the structure and the boxes once when the file is read, and polygons and run lengths when their image is
taken.  :class:`DatasetError` is the only error that they raise for a file.

What is tolerated, because real COCO files have it: boxes without area or outside of the image (dropped), empty or too
short polygons (mmdet's ``LoadAnnotations`` ignores such an instance), missing ``area``, missing ``iscrowd``, integral
floats as sizes, extra keys, category ids with gaps, images without annotations, a file without annotations (test-dev).
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.fileio import get_local_path
from pycocotools import mask as mask_utils

from boltz_mm.registry import DATASETS

# Longest side of an image, and largest polygon coordinate, that is taken for real.
MAX_SIDE = 1_000_000


class DatasetError(ValueError):
    """A file of a dataset cannot be used; the message names the file and, where known, image and annotation id."""


class CheckedCOCO(COCO):
    """pycocotools' ``COCO`` whose file is checked first and whose results may be empty.

    Args:
        annotation_file: Path of the annotation file.  ``None`` gives an empty object.

    Raises:
        DatasetError: The file is missing, is not JSON, or its contents are not in COCO's layout.
    """

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        if annotation_file is not None:
            self.dataset = read_coco(annotation_file)
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def loadRes(self, resFile: Any) -> COCO:  # noqa: N802, N803
        """As in pycocotools, but no detection at all is a valid result."""
        if isinstance(resFile, list) and not resFile:
            result = CheckedCOCO()
            result.dataset = {**self.dataset, 'annotations': []}
            result.createIndex()
            return result
        return super().loadRes(resFile)


def read_coco(path: str) -> dict[str, Any]:
    """Read and check an annotation file.

    Missing ``area`` and ``iscrowd`` are filled in (box area, 0).

    Raises:
        DatasetError: See :class:`CheckedCOCO`.
    """
    return read_checked_json(path, check_coco)


def read_checked_json(path: str, check: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Read an annotation file and return what ``check`` makes of its content.

    Raises:
        DatasetError: The file cannot be read, is not JSON, or ``check`` raised this error; the file is named.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except OSError as error:
        raise DatasetError(f'{path}: the annotation file cannot be read: {error.strerror or error}') from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f'{path}: cannot be read as JSON: {error}') from error
    try:
        return check(content)
    except DatasetError as error:
        raise DatasetError(f'{path}: {error}') from None


def check_coco(content: Any) -> dict[str, Any]:
    """Check the structure, ids and boxes of a COCO dictionary (see :func:`read_coco`)."""
    images, categories = check_images_and_categories(content)
    _by_id(content['annotations'], 'annotation')
    for annotation in content['annotations']:
        _check_annotation(annotation, images, categories)
    return content


def check_images_and_categories(content: Any) -> tuple[dict[Any, dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Check what instance and panoptic files have in common.

    Args:
        content: The file; without ``annotations`` it gets an empty list of them.

    Returns:
        Images and categories by their ids.

    Raises:
        DatasetError: One of them is not in COCO's layout, or an id or a category's name is used twice.
    """
    if not isinstance(content, dict):
        raise DatasetError(f'expected a dictionary, got {short(content)}')
    for key in ('images', 'categories', 'annotations'):
        content.setdefault(key, [] if key == 'annotations' else None)
        if not isinstance(content[key], list):
            raise DatasetError(f'{key!r} has to be a list, got {short(content[key])}')
    categories = _by_id(content['categories'], 'category')
    for number, category in categories.items():
        if not isinstance(number, int) or not isinstance(category.get('name'), str):
            raise DatasetError(f'category {number!r}: needs an integer id and a name, got {short(category)}')
    names = Counter(category['name'] for category in categories.values())
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise DatasetError(f'two categories have the same name: {short(twice[0])}')
    images = _by_id(content['images'], 'image')
    for number, image in images.items():
        _check_image(number, image)
    return images, categories


def _by_id(entries: list[Any], kind: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DatasetError(f'{kind} at position {position}: expected a dictionary, got {short(entry)}')
        number = entry.get('id')
        if isinstance(number, bool) or not isinstance(number, int | str):
            raise DatasetError(f'{kind} at position {position}: needs an id, got {short(number)}')
        if number in found:
            raise DatasetError(f'{kind} {number!r}: the id is used twice')
        found[number] = entry
    return found


def _check_image(number: Any, image: dict[str, Any]) -> None:
    name = image.get('file_name')
    if not isinstance(name, str) or not name:
        raise DatasetError(f'image {number!r}: file_name has to be a name, got {short(name)}')
    for key in ('height', 'width'):
        side: Any = image.get(key)
        if not _is_number(side) or side != int(side) or not 0 < side <= MAX_SIDE:
            raise DatasetError(f'image {number!r}: {key} has to be an integer in 1..{MAX_SIDE}, got {short(side)}')
        image[key] = int(side)


def _check_annotation(annotation: dict[str, Any], images: dict, categories: dict) -> None:
    image_id, category_id = annotation.get('image_id'), annotation.get('category_id')
    where = f'image {short(image_id)}, annotation {annotation["id"]!r}'
    if not is_key(image_id) or image_id not in images:
        raise DatasetError(f'{where}: the image is not listed in the file')
    if not is_key(category_id) or category_id not in categories:
        raise DatasetError(f'{where}: unknown category {short(category_id)}')
    box = annotation.get('bbox')
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DatasetError(f'{where}: bbox has to be 4 finite numbers, got {short(box)}')
    annotation.setdefault('area', box[2] * box[3])
    if not _is_number(annotation['area']):
        raise DatasetError(f'{where}: area has to be a finite number, got {short(annotation["area"])}')
    crowd = annotation.setdefault('iscrowd', 0)
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise DatasetError(f'{where}: iscrowd has to be 0 or 1, got {short(crowd)}')


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Check polygons or run lengths before pycocotools sees them.

    Raises:
        DatasetError: They are neither a list of lists of finite numbers nor a run-length encoding of this size.
    """
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or not all(map(_is_coordinate, polygon)):
                raise DatasetError(f'segmentation: a polygon has to be a list of coordinates, got {short(polygon)}')
        return
    if not isinstance(segmentation, dict):
        raise DatasetError(f'segmentation has to be polygons or run lengths, got {short(segmentation)}')
    size, counts = segmentation.get('size'), segmentation.get('counts')
    if size != [height, width]:
        raise DatasetError(f'segmentation: size has to be {[height, width]}, got {short(size)}')
    if isinstance(counts, list):
        if not all(isinstance(run, int) and 0 <= run <= height * width for run in counts):
            raise DatasetError(f'segmentation: counts have to be lengths in 0..{height * width}')
        if sum(counts) != height * width:
            raise DatasetError(f'segmentation: counts add up to {sum(counts)}, not to {height} x {width}')
    elif not isinstance(counts, str):
        raise DatasetError(f'segmentation: counts have to be a list or a string, got {short(counts)}')
    else:
        _check_compressed(segmentation)


def _check_compressed(segmentation: dict[str, Any]) -> None:
    try:
        mask_utils.decode(segmentation)
    except Exception as error:
        raise DatasetError(f'segmentation: broken run lengths: {error}') from error


def is_key(value: Any) -> bool:
    """Whether the value can be an id."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A finite number that float64 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_coordinate(value: Any) -> bool:
    return _is_number(value) and abs(value) <= MAX_SIDE


def short(value: Any) -> str:
    """The value as text of at most 60 characters, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset`` (contiguous labels) with a checked annotation file and errors that name the image.

    The classes of ``metainfo`` have to appear in the file, in the same order: mmdet numbers labels in the order of the
    file, so that a missing or moved class would silently give objects the wrong names.

    Differs from ``CocoDataset`` in what is an object: boxes are clipped to the image and kept if they have an area
    then (``CocoDataset`` drops boxes thinner than a pixel, and does not clip).  Crowd regions are dropped.

    Each instance also has ``ann_id`` and ``area``.  Without ``data_prefix['img']`` file names are relative to
    ``data_root``.

    Raises:
        DatasetError: On reading, for a broken file; on taking a sample, for a broken, missing or differently sized
            image or a broken segmentation.
    """

    COCOAPI = CheckedCOCO

    def load_data_list(self) -> list[dict]:
        """Read the file; see the class for what is checked."""
        with get_local_path(self.ann_file, backend_args=self.backend_args) as path:
            coco = self.COCOAPI(path)
        try:
            self.cat2label = self._labels(coco.dataset['categories'])
        except DatasetError as error:
            raise DatasetError(f'{self.ann_file}: {error}') from None
        self.cat_ids = list(self.cat2label)
        self.data_prefix.setdefault('img', self.data_root or '')
        self.cat_img_map = coco.cat_img_map
        return [
            self.parse_data_info(
                {'raw_img_info': {**image, 'img_id': image['id']}, 'raw_ann_info': coco.imgToAnns[image['id']]}
            )
            for image in coco.dataset['images']
        ]

    def _labels(self, categories: list[dict]) -> dict[int, int]:
        """Labels by category id, of the categories that are among the classes."""
        classes = list(self.metainfo['classes'])
        known = [category for category in categories if category['name'] in classes]
        names = [category['name'] for category in known]
        if names != classes:
            raise DatasetError(
                'the classes of metainfo have to appear in the file, in their order; '
                f'metainfo has {short(classes)}, of these the file has {short(names)}'
            )
        return {category['id']: label for label, category in enumerate(known)}

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """One image with its objects; see the class for what an object is."""
        info = super().parse_data_info({'raw_img_info': raw_data_info['raw_img_info'], 'raw_ann_info': []})
        annotations = [annotation for annotation in raw_data_info['raw_ann_info'] if self._is_wanted(annotation)]
        boxes = _clipped_corners([annotation['bbox'] for annotation in annotations], info['height'], info['width'])
        for annotation, (x1, y1, x2, y2) in zip(annotations, boxes, strict=True):
            if x2 > x1 and y2 > y1:
                info['instances'].append(
                    {
                        'ignore_flag': 0,
                        'bbox': [x1, y1, x2, y2],
                        'bbox_label': self.cat2label[annotation['category_id']],
                        # With masks on, LoadAnnotations wants the key, and ignores an instance whose list is empty.
                        'mask': annotation.get('segmentation') or [],
                        'ann_id': annotation['id'],
                        'area': annotation['area'],
                    }
                )
        return info

    def _is_wanted(self, annotation: dict) -> bool:
        crowd = annotation['iscrowd'] or annotation.get('ignore')
        return not crowd and annotation['category_id'] in self.cat2label

    def prepare_data(self, idx: int) -> Any:
        """The sample after the pipeline.

        Raises:
            DatasetError: The image or one of its segmentations cannot be used.
        """
        info = self.get_data_info(idx)
        where = f'{info["img_path"]} (image {info["img_id"]!r} of {self.ann_file})'
        for instance in info['instances']:
            try:
                check_segmentation(instance['mask'], info['height'], info['width'])
            except DatasetError as error:
                raise DatasetError(f'{where}, annotation {instance["ann_id"]!r}: {error}') from None
        try:
            sample = self.pipeline(info)
        except MemoryError:
            raise
        except DatasetError as error:
            raise DatasetError(f'{where}: {error}') from None
        except Exception as error:
            raise DatasetError(f'{where}: {type(error).__name__}: {error}') from error
        shape = _loaded_shape(sample)
        if shape is not None and tuple(shape) != (info['height'], info['width']):
            listed = f'{info["width"]} x {info["height"]}'
            raise DatasetError(f'{where}: the image is {shape[1]} x {shape[0]} (width x height), listed as {listed}')
        return sample


def _clipped_corners(boxes: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Boxes (x, y, w, h) as corners inside the image, computed in float32 as the official code does."""
    with np.errstate(over='ignore', invalid='ignore'):
        corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
    return np.clip(corners, 0, np.array([width, height, width, height], dtype=np.float32)).tolist()


def _loaded_shape(sample: Any) -> tuple[int, int] | None:
    """Height and width of the image as loaded, where the pipeline kept them."""
    if not isinstance(sample, dict):
        return None
    packed = sample.get('data_samples')
    return sample.get('ori_shape') if packed is None else packed.metainfo.get('ori_shape')
