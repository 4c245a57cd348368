"""Mask targets and mask pasting against full-image ``grid_sample``."""

import pytest
import torch
import torch.nn.functional as F

from boltz_mm.models.layers.mask_grid import mask_targets, paste_mask, paste_masks, sample_masks


def grid_sample_targets(masks, boxes, m):
    steps = (torch.arange(m, dtype=boxes.dtype) + 0.5) / m
    points = (boxes[:, :2] - boxes[:, 2:] / 2)[:, None] + steps[:, None] * boxes[:, 2:][:, None]  # [n, m, 2]
    x = points[..., 0][:, None].expand(-1, m, -1)
    y = points[..., 1][:, :, None].expand(-1, -1, m)
    grid = torch.stack([x, y], -1) * 2 - 1
    return F.grid_sample(masks[:, None].to(boxes.dtype), grid, align_corners=False)[:, 0]


def grid_sample_paste(probs, boxes, size):
    y = (torch.arange(size[0]) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (torch.arange(size[1]) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(probs[:, None], grid, align_corners=False)[:, 0]


def random_boxes(n, generator):
    """Normalised boxes, some of which reach outside the image."""
    return torch.rand(n, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.8, 0.8])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('mask_dtype', [torch.bool, torch.uint8, torch.float32])
def test_sampling_equals_grid_sample(dtype, mask_dtype):
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(9, 45, 61, generator=generator) > 0.5).to(mask_dtype)
    boxes = random_boxes(9, generator).to(dtype)
    ours, wanted = sample_masks(masks, boxes, 28), grid_sample_targets(masks, boxes, 28)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-12)


def test_targets_on_pixel_aligned_boxes_equal_grid_sample():
    # Box sides of 28 and 56 pixels put the points on pixel centres and half-way between pixels: values of exactly 0.5.
    masks = torch.zeros(4, 96, 128, dtype=torch.bool)
    corners = torch.tensor([[3, 5, 31, 33], [10, 20, 66, 76], [64, 8, 120, 64], [0, 0, 112, 84]])
    for mask, (x1, y1, x2, y2) in zip(masks, corners.tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = True
    x1, y1, x2, y2 = (corners / torch.tensor([128, 96, 128, 96])).unbind(1)
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
    wanted = (grid_sample_targets(masks, boxes, 28) >= 0.5).float()
    assert torch.equal(mask_targets(masks, boxes, 28), wanted)


@pytest.mark.parametrize('shape', [(0, 20, 30), (2, 0, 0)])
def test_no_masks_or_empty_images(shape):
    targets = mask_targets(torch.zeros(shape, dtype=torch.uint8), torch.rand(shape[0], 4), 28)
    assert targets.shape == (shape[0], 28, 28)
    assert not targets.any()


@pytest.mark.parametrize('size', [(45, 61), (7, 300), (1, 1)])
def test_paste_equals_full_image_grid_sample(size):
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(12, 28, 28, generator=generator)
    cx, cy, w, h = random_boxes(12, generator).unbind(1)
    boxes = torch.stack([cx - w, cy - h, cx + w, cy + h], 1) * torch.tensor([size[1], size[0], size[1], size[0]])
    wanted = grid_sample_paste(probs, boxes, size)
    for prob, box, full in zip(probs, boxes, wanted, strict=True):
        values, (rows, columns) = paste_mask(prob, box, size)
        ours = torch.zeros(size)
        ours[rows, columns] = values
        assert torch.equal(ours, full)

    masks, qualities = paste_masks(probs, boxes, size)
    inside = wanted >= 0.5
    assert torch.equal(masks, inside)
    mean = torch.nan_to_num((wanted * inside).sum((1, 2)) / inside.sum((1, 2)))
    torch.testing.assert_close(qualities, mean)


@pytest.mark.parametrize(
    'box', [[5, 5, 5, 9], [9, 9, 5, 5], [-50, -50, -20, -20], [500, 2, 520, 9], [float('nan'), 0, 3, 3]]
)
def test_degenerate_and_outside_boxes_give_empty_masks_of_quality_zero(box):
    masks, qualities = paste_masks(torch.ones(1, 28, 28), torch.tensor([box], dtype=torch.float32), (30, 40))
    assert masks.shape == (1, 30, 40)
    assert not masks.any()
    assert qualities.tolist() == [0]


def test_mask_below_one_half_is_empty_of_quality_zero():
    masks, qualities = paste_masks(torch.full((1, 28, 28), 0.4), torch.tensor([[2.0, 2, 20, 20]]), (30, 40))
    assert not masks.any()
    assert qualities.tolist() == [0]


def test_no_boxes():
    masks, qualities = paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (30, 40))
    assert masks.shape == (0, 30, 40)
    assert qualities.shape == (0,)
