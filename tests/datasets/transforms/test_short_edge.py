"""Resizing by the short side: detectron2's sizes, PIL's pixels."""

import numpy as np
import pytest
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from PIL import Image

from boltz_mm.datasets.transforms.draws import RecordedDraws
from boltz_mm.datasets.transforms.short_edge import RandomShortEdgeResize, centre_indexes, short_edge_shape


@pytest.mark.parametrize(
    ('shape', 'size', 'max_size', 'expected'),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67: rounded, not cut
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((500, 500), 256, None, (256, 256)),
        ((1, 5000), 512, 2048, (1, 2048)),
    ],
)
def test_sizes(shape, size, max_size, expected):
    assert short_edge_shape(shape, size, max_size) == expected


@pytest.mark.parametrize(('size', 'new_size'), [(7, 3), (7, 7), (5, 13), (512, 1000), (1, 4)])
def test_nearest_is_pils(size, new_size):
    row = Image.fromarray(np.arange(size, dtype=np.int32)[None], mode='I')
    pil = np.asarray(row.resize((new_size, 1), Image.Resampling.NEAREST))[0]
    np.testing.assert_array_equal(centre_indexes(size, new_size), pil)


def test_everything_is_resized():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    ids = np.arange(600, dtype=np.int32).reshape(20, 30) + 70000
    results = {
        'img': image,
        'gt_seg_map': ids,
        'gt_bboxes': HorizontalBoxes([[3.0, 4, 9, 16]]),
        'gt_masks': BitmapMasks((ids[None] % 2).astype(np.uint8), 20, 30),
    }
    draws = RecordedDraws([33])
    results = RandomShortEdgeResize([10, 33], max_size=45, draws=draws)(results)
    assert results['img_shape'] == (30, 45) and draws.left == 0
    np.testing.assert_array_equal(results['img'], Image.fromarray(image).resize((45, 30), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(results['gt_seg_map'], ids[centre_indexes(20, 30)[:, None], centre_indexes(30, 45)])
    np.testing.assert_array_equal(results['gt_masks'].masks[0], results['gt_seg_map'] % 2)
    assert results['gt_bboxes'].tensor.tolist() == [[4.5, 6, 13.5, 24]]
    with pytest.raises(ValueError, match='sizes must not be empty'):
        RandomShortEdgeResize([])
