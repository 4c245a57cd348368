"""A small COCO panoptic dataset on disk: two things, stuff, a crowd, void, and a category that no class has."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from boltz_mm.datasets.coco_panoptic import id2rgb

SIZE = (20, 24)  # height, width
METAINFO = {'classes': ('cat', 'dog', 'sky'), 'thing_classes': ('cat', 'dog'), 'stuff_classes': ('sky',)}
CAT, DOG, CROWD, SKY, OTHER = 5, 70001, 300, 12, 99


def panoptic_ids() -> np.ndarray:
    """The picture of ids; row 19 is void."""
    ids = np.full(SIZE, SKY, dtype=np.int32)
    ids[2:8, 3:9] = CAT
    ids[9:15, 10:18] = DOG
    ids[2:8, 14:22] = CROWD
    ids[16:18, 0:6] = OTHER
    ids[19] = 0
    return ids


def panoptic_content() -> dict[str, Any]:
    """Two annotated images, and one without annotation.  The categories of the file are in another order."""

    def segment(number: int, category: int, crowd: int = 0) -> dict[str, int]:
        return {'id': number, 'category_id': category, 'iscrowd': crowd}

    segments = [segment(DOG, 8), segment(SKY, 2), segment(CROWD, 7, 1), segment(CAT, 7), segment(OTHER, 9)]
    return {
        'images': [{'id': i, 'file_name': f'{i}.jpg', 'height': SIZE[0], 'width': SIZE[1]} for i in (1, 2, 3)],
        'annotations': [
            {'image_id': i, 'file_name': f'ids_{i}.png', 'segments_info': copy.deepcopy(segments)} for i in (1, 2)
        ],
        'categories': [
            {'id': 2, 'name': 'sky', 'isthing': 0},
            {'id': 7, 'name': 'cat', 'isthing': 1},
            {'id': 8, 'name': 'dog', 'isthing': 1},
            {'id': 9, 'name': 'other', 'isthing': 0},
        ],
    }


def write_panoptic(folder: Path, content: Any = None) -> Path:
    """Write images, pictures of ids and annotations; returns the annotation file."""
    for number in (1, 2, 3):
        Image.new('RGB', SIZE[::-1], (number, 50, 90)).save(folder / f'{number}.jpg')
        if number < 3:
            Image.fromarray(id2rgb(panoptic_ids())).save(folder / f'ids_{number}.png')
    path = folder / 'panoptic.json'
    path.write_text(json.dumps(panoptic_content() if content is None else content))
    return path
