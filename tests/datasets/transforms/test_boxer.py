"""BoxeR's transforms beside the golden cases: odd sizes, vanishing objects, every kind of annotation, mmdet's parts."""

import random

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.datasets.transforms import PackDetInputs
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from PIL import Image

from boltz_mm.datasets.transforms import boxer
from boltz_mm.datasets.transforms.draws import RecordedDraws
from boltz_mm.registry import TRANSFORMS

BOXES = torch.tensor([[4.0, 5, 20, 30], [30, 10, 58, 36]])


def _sample(height: int = 40, width: int = 60) -> dict:
    generator = np.random.default_rng(0)
    return {
        'img': generator.integers(0, 256, (height, width, 3), dtype=np.uint8),
        'img_shape': (height, width),
        'ori_shape': (height, width),
        'gt_bboxes': HorizontalBoxes(BOXES.clone()),
        'gt_bboxes_labels': np.array([1, 2]),
        'gt_ignore_flags': np.array([False, True]),
        'gt_masks': BitmapMasks(generator.integers(0, 2, (2, height, width), dtype=np.uint8), height, width),
        'gt_seg_map': generator.integers(0, 5, (height, width), dtype=np.uint8),
    }


@pytest.fixture(params=['bitmaps', 'polygons'])
def sample(request) -> dict:
    results = _sample()
    if request.param == 'polygons':
        parts = [[np.array([x1, y1, x2, y1, x2, y2, x1, y2])] for x1, y1, x2, y2 in BOXES.tolist()]
        results['gt_masks'] = PolygonMasks(parts, 40, 60)
    return results


@pytest.mark.parametrize(
    ('shape', 'size', 'max_size', 'expected'),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is rounded down
        ((640, 480), 800, 1333, (1066, 800)),
        ((400, 1000), 800, 1333, (533, 1332)),  # the long side misses the maximum by one
        ((800, 900), 800, 1333, (800, 900)),
        ((100, 100), (70, 31), None, (31, 70)),
        ((1, 1), 800, 1333, (800, 800)),
        ((1, 5000), 800, 1333, (1, 1333)),
        ((5000, 1), 800, 1333, (1333, 1)),
        ((3, 1000), 800, None, (800, 266666)),
    ],
)
def test_resized_shape(shape, size, max_size, expected):
    assert boxer.resized_shape(shape, size, max_size) == expected


@pytest.mark.parametrize('size', [1, 2, 3, 7, 31, 480, 640])
@pytest.mark.parametrize('new_size', [1, 2, 5, 33, 64, 800, 1333])
def test_nearest_indexes_are_those_of_torch(size, new_size):
    values = torch.arange(size, dtype=torch.float32)[None, None]
    expected = torch.nn.functional.interpolate(values, size=new_size, mode='nearest')[0, 0]
    np.testing.assert_array_equal(boxer.nearest_indexes(size, new_size), expected.numpy())


@pytest.mark.parametrize('shape', [(20, 90), (80, 30), (40, 61), (7, 60), (10, 59), (1, 1), (400, 600)])
@pytest.mark.parametrize('channels', [(), (1,), (3,)])
def test_resize_image_is_pil_up_to_the_order_of_passes(shape, channels):
    img = np.random.default_rng(0).integers(0, 256, (40, 60, *channels), dtype=np.uint8)
    ours = boxer.resize_image(img, shape)
    pil = Image.fromarray(img.squeeze(-1) if channels == (1,) else img).resize(shape[::-1], Image.Resampling.BILINEAR)
    assert ours.shape == (*shape, *channels)
    difference = ours.astype(int) - np.array(pil).reshape(ours.shape)
    assert np.abs(difference).max() <= 1


def test_resize_image_begins_with_the_pass_that_pillow_13_begins_with():
    img = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    down_then_across = boxer.resize_image(boxer.resize_image(img, (20, 60)), (20, 70))
    across_then_down = boxer.resize_image(boxer.resize_image(img, (40, 70)), (20, 70))
    assert (down_then_across != across_then_down).any()
    np.testing.assert_array_equal(boxer.resize_image(img, (20, 70)), down_then_across)
    both_shrink = boxer.resize_image(boxer.resize_image(img, (40, 45)), (20, 45))
    np.testing.assert_array_equal(boxer.resize_image(img, (20, 45)), both_shrink)


def test_channel_order_does_not_matter():
    img = _sample()['img']
    np.testing.assert_array_equal(
        boxer.resize_image(img[..., ::-1], (50, 33)), boxer.resize_image(img, (50, 33))[..., ::-1]
    )


def test_resize_carries_everything(sample):
    results = boxer.BoxeRResize(size=80, max_size=200)(sample)
    assert results['img'].shape == (80, 120, 3)
    assert results['img_shape'] == (80, 120)
    assert results['scale_factor'] == (2.0, 2.0)
    torch.testing.assert_close(results['gt_bboxes'].tensor[0], torch.tensor([8.0, 10, 40, 60]))
    assert isinstance(results['gt_masks'], BitmapMasks)
    assert results['gt_masks'].masks.shape == (2, 80, 120)
    assert results['gt_seg_map'].shape == (80, 120)
    np.testing.assert_array_equal(results['homography_matrix'], np.diag([2, 2, 1]))


def test_polygons_are_rasterised_before_they_are_resized():
    polygons, bitmaps = _sample(), _sample()
    triangle = [[np.array([3.0, 3.0, 30.0, 9.0, 11.0, 33.0])], [np.array([30.0, 10, 58, 10, 44, 36])]]
    polygons['gt_masks'] = PolygonMasks(triangle, 40, 60)
    bitmaps['gt_masks'] = PolygonMasks(triangle, 40, 60).to_bitmap()
    ours = boxer.BoxeRResize(size=63)(polygons)['gt_masks'].masks
    np.testing.assert_array_equal(ours, boxer.BoxeRResize(size=63)(bitmaps)['gt_masks'].masks)
    assert (ours != PolygonMasks(triangle, 40, 60).resize((63, 94)).to_bitmap().masks).any()


def test_resize_of_float_image_is_refused(sample):
    sample['img'] = sample['img'].astype(np.float32)
    with pytest.raises(TypeError, match='float32'):
        boxer.BoxeRResize(size=20)(sample)


def test_resize_of_four_channels_is_refused(sample):
    sample['img'] = np.zeros((40, 60, 4), dtype=np.uint8)
    with pytest.raises(TypeError, match='40, 60, 4'):
        boxer.BoxeRResize(size=20)(sample)


def test_crop_drops_objects_outside_and_keeps_empty_masks(sample):
    sample['gt_masks'] = BitmapMasks(np.zeros((2, 40, 60), dtype=np.uint8), 40, 60)
    results = boxer.crop(sample, 2, 25, (30, 30))
    torch.testing.assert_close(results['gt_bboxes'].tensor, torch.tensor([[5.0, 8, 30, 30]]))
    assert results['gt_bboxes_labels'].tolist() == [2]
    assert results['gt_ignore_flags'].tolist() == [True]
    assert results['gt_masks'].masks.shape == (1, 30, 30)
    assert not results['gt_masks'].masks.any()
    np.testing.assert_array_equal(results['homography_matrix'] @ [25, 2, 1], [0, 0, 1])


def test_all_objects_may_vanish(sample):
    results = PackDetInputs(meta_keys=())(boxer.crop(sample, 0, 0, (4, 60)))
    assert len(results['data_samples'].gt_instances) == 0
    assert results['data_samples'].gt_instances.masks.masks.shape == (0, 4, 60)


@pytest.mark.parametrize('region', [(-1, 0, 5, 5), (0, 56, 5, 5), (38, 0, 3, 3), (0, 0, 0, 5)])
def test_crop_outside_is_refused(sample, region):
    top, left, *shape = region
    with pytest.raises(ValueError, match='does not lie inside'):
        boxer.crop(sample, top, left, tuple(shape))


def test_random_crop_of_small_image_takes_all_of_it(sample):
    draws = RecordedDraws([60, 40])
    results = boxer.BoxeRRandomCrop(min_size=384, max_size=600, draws=draws)(sample)
    assert results['img'].shape == (40, 60, 3)
    assert draws.left == 0  # no offset is drawn


def test_random_crop_draws_stay_inside():
    transform = boxer.BoxeRRandomCrop(min_size=10, max_size=30)
    random.seed(0)
    torch.manual_seed(0)
    shapes = {transform(_sample())['img'].shape[:2] for _ in range(200)}
    assert {height for height, _ in shapes} == {width for _, width in shapes} == set(range(10, 31))


def test_scale_jitter_uses_one_offset_for_both_axes(sample):
    # 40 x 60 is fitted into twice 32 x 32: 43 x 64, cropped to 32 x 32 at (round(11 / 2), round(32 / 2)).
    results = boxer.BoxeRScaleJitter(target=(32, 32), draws=RecordedDraws([2.0, 0.5]))(sample)
    assert results['img'].shape == (32, 32, 3)
    np.testing.assert_allclose(results['homography_matrix'][:2, 2], [-16, -6])


def test_scale_jitter_of_small_scale_crops_nothing(sample):
    results = boxer.BoxeRScaleJitter(target=(32, 32), draws=RecordedDraws([0.5, 0.9]))(sample)
    assert results['img'].shape == (11, 16, 3)


def test_choice_and_flip_take_the_given_draws(sample):
    branches = [[{'type': 'boltz_mm.BoxeRResize', 'size': 20}], [{'type': 'boltz_mm.BoxeRResize', 'size': 30}]]
    before = sample['img'].copy()
    results = Compose(
        [
            boxer.BoxeRRandomFlip(prob=0.5, draws=RecordedDraws([0.6])),
            boxer.BoxeRRandomFlip(prob=0.5, draws=RecordedDraws([0.4])),
            boxer.BoxeRRandomChoice(branches, draws=RecordedDraws([1])),
        ]
    )(sample)
    assert results['flip_direction'] == 'horizontal'
    np.testing.assert_array_equal(results['img'], boxer.resize_image(before[:, ::-1], (30, 45)))


@pytest.mark.parametrize('shape', [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_odd_images_pass_the_training_augmentation(shape):
    steps = [
        dict(type='boltz_mm.BoxeRRandomFlip'),
        dict(type='boltz_mm.BoxeRRandomResize', sizes=[40, 50], max_size=133),
        dict(type='boltz_mm.BoxeRRandomCrop', min_size=30, max_size=60),
        dict(type='boltz_mm.BoxeRScaleJitter', target=(64, 64)),
    ]
    pipeline = Compose([TRANSFORMS.build(step) for step in steps] + [PackDetInputs(meta_keys=())])
    results = _sample(*shape)
    results['gt_bboxes'] = HorizontalBoxes([[0, 0, shape[1], shape[0]], [0, 0, 1, 1]], dtype=torch.float32)
    packed = pipeline(results)
    assert min(packed['inputs'].shape) >= 1


def test_arrays_as_boxes_are_taken_too(sample):
    sample['gt_bboxes'] = sample['gt_bboxes'].numpy()
    results = boxer.BoxeRResize(size=80)(sample)
    np.testing.assert_allclose(results['gt_bboxes'][0], [8, 10, 40, 60])


def test_image_alone_is_enough():
    results = boxer.BoxeRScaleJitter(target=(32, 32))({'img': np.zeros((40, 60), dtype=np.uint8)})
    assert results['img'].ndim == 2


@pytest.mark.parametrize(
    'config',
    [
        dict(type='boltz_mm.BoxeRRandomResize', sizes=[]),
        dict(type='boltz_mm.BoxeRRandomCrop', min_size=0, max_size=5),
        dict(type='boltz_mm.BoxeRRandomCrop', min_size=6, max_size=5),
    ],
)
def test_senseless_settings_are_refused(config):
    with pytest.raises(ValueError, match='sizes|min_size'):
        TRANSFORMS.build(config)


def test_settings_are_shown():
    for config in (
        dict(type='boltz_mm.BoxeRResize', size=8, max_size=9),
        dict(type='boltz_mm.BoxeRRandomResize', sizes=[8], max_size=9),
        dict(type='boltz_mm.BoxeRRandomCrop', min_size=8, max_size=9),
        dict(type='boltz_mm.BoxeRScaleJitter', target=(8, 9)),
    ):
        shown = repr(TRANSFORMS.build(config))
        assert shown.startswith(config['type'].removeprefix('boltz_mm.'))
        assert '8' in shown and '9' in shown
