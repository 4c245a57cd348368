"""A small COCO dataset on disk for the tests of datasets, metrics and configs."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

SIZE = (30, 40)  # height, width


def rle(top: int, left: int, height: int, width: int, compressed: bool = False) -> dict[str, Any]:
    """Run lengths of a rectangle."""
    mask = np.zeros(SIZE, dtype=np.uint8, order='F')
    mask[top : top + height, left : left + width] = 1
    encoded = mask_utils.encode(mask)
    if compressed:
        return {'size': list(SIZE), 'counts': encoded['counts'].decode()}
    flat = mask.flatten(order='F')
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], borders, [flat.size]])).tolist()
    return {'size': list(SIZE), 'counts': ([0] if flat[0] else []) + runs}


def polygon(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def coco_content(names: tuple[str, ...] = ('person', 'bicycle', 'street sign'), ids=(1, 2, 4)) -> dict[str, Any]:
    """Five images: plain objects, a crowd and a run-length mask, no object, odd annotations, one object."""
    annotations = []

    def add(image_id: int, category: int, box: list[float], segmentation: Any, **more: Any) -> None:
        area = box[2] * box[3]
        entry = {'id': 100 + len(annotations), 'image_id': image_id, 'category_id': category, 'bbox': box}
        annotations.append({**entry, 'segmentation': segmentation, 'area': area, 'iscrowd': 0, **more})

    add(1, ids[0], [5, 6, 10, 12], polygon(5, 6, 10, 12))
    add(1, ids[1], [20, 2, 15, 8], polygon(20, 2, 7, 8) + polygon(30, 2, 5, 8))
    add(2, ids[0], [2, 2, 20, 20], rle(2, 2, 20, 20), iscrowd=1)
    add(2, ids[2], [10, 10, 4, 5], rle(10, 10, 5, 4, compressed=True))
    add(4, ids[0], [12, 12, 0, 5], [[12, 12, 12, 17, 12, 15]])  # no area
    add(4, ids[0], [-5, -5, 10, 10], polygon(-5, -5, 10, 10))  # partly outside
    add(4, ids[1], [50, 50, 5, 5], polygon(50, 50, 5, 5))  # outside
    add(4, ids[1], [1, 1, 3, 3], [])
    add(4, ids[1], [1, 1, 3, 3], [[1, 1, 2]])
    add(5, ids[2], [0.25, 0.5, 0.5, 0.5], polygon(0.25, 0.5, 0.5, 0.5))
    return {
        'images': [{'id': i, 'file_name': f'{i}.png', 'height': SIZE[0], 'width': SIZE[1]} for i in range(1, 6)],
        'annotations': annotations,
        'categories': [{'id': number, 'name': name} for number, name in zip(ids, names, strict=True)],
    }


def write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(1, 6):
        Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / f'{number}.png')


def write_coco(folder: Path, content: Any = None) -> Path:
    """Write images and annotations; returns the annotation file."""
    write_images(folder)
    path = folder / 'instances.json'
    path.write_text(json.dumps(copy.deepcopy(coco_content() if content is None else content)))
    return path
