"""Reference windows, valid ratios and box embeddings."""

import math

import pytest
import torch
from mmdet.models.layers import coordinate_to_encoding

from boltz_mm.models.layers.box_position import (
    BoxPositionalEncoding,
    reference_windows,
    reference_windows_3d,
    shapes_on_device,
    sine_embedding,
    valid_ratios,
)

SHAPES = [(8, 11), (4, 6), (1, 3)]


def padding_mask(shape: tuple[int, int], valid: tuple[int, int]) -> torch.Tensor:
    mask = torch.ones(1, *shape, dtype=torch.bool)
    mask[:, : valid[0], : valid[1]] = False
    return mask


def test_windows_without_padding_sit_on_cells() -> None:
    windows = reference_windows(SHAPES, ref_size=3)
    assert windows.shape == (1, 8 * 11 + 4 * 6 + 3, 4)
    row, column = 2, 5  # of the second level
    token = 8 * 11 + row * 6 + column
    expected = [(column + 0.5) / 6, (row + 0.5) / 4, 3 / 6, 3 / 4]
    torch.testing.assert_close(windows[0, token], torch.tensor(expected), rtol=0, atol=1e-6)


def test_padding_does_not_move_windows_of_real_tokens() -> None:
    """Windows are fractions of the unpadded image."""
    small = [(5, 7), (3, 4), (1, 2)]
    masks = [padding_mask(shape, valid) for shape, valid in zip(SHAPES, small, strict=True)]
    windows = reference_windows(SHAPES, masks)
    keep = ~torch.cat([mask.flatten(1) for mask in masks], dim=1)
    torch.testing.assert_close(windows[keep], reference_windows(small)[0], rtol=0, atol=0)
    padded = windows[~keep]
    assert (padded[:, :2].amin(-1) == -1).all()  # a whole image away, so nothing is sampled and nothing chosen
    assert windows.half().isfinite().all()


def test_all_false_masks_equal_none() -> None:
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in SHAPES]
    assert torch.equal(reference_windows(SHAPES, masks), reference_windows(SHAPES).expand(2, -1, -1))
    assert torch.equal(valid_ratios(masks), torch.ones(2, 3, 2))


def test_valid_ratios_are_width_then_height() -> None:
    ratios = valid_ratios([padding_mask((8, 11), (6, 5)), padding_mask((4, 6), (3, 3))])
    torch.testing.assert_close(ratios, torch.tensor([[[5 / 11, 6 / 8], [3 / 6, 3 / 4]]]))


def test_sine_embedding_is_the_usual_one_with_x_first() -> None:
    points = torch.rand(2, 7, 2)
    expected = coordinate_to_encoding(points.flip(-1), num_feats=16)
    torch.testing.assert_close(sine_embedding(points, 32), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dims', [4, 8, 256])
def test_box_embedding_adds_centre_and_size(dims: int) -> None:
    boxes = torch.rand(3, 5, 4, dtype=torch.float64)
    encoded = BoxPositionalEncoding(dims)(boxes)
    assert encoded.shape == (3, 5, dims)
    assert encoded.dtype == torch.float64
    assert torch.equal(encoded, sine_embedding(boxes[..., :2], dims) + sine_embedding(boxes[..., 2:], dims))
    # first channel of each part: sin(2 pi v) of x and w, of y and h
    first = (2 * math.pi * boxes).sin()
    torch.testing.assert_close(encoded[..., 0], first[..., 0] + first[..., 2])
    torch.testing.assert_close(encoded[..., dims // 2], first[..., 1] + first[..., 3])


def test_ref_size_of_the_encoding_reaches_the_windows() -> None:
    windows = BoxPositionalEncoding(8, ref_size=2).reference_windows(SHAPES)
    assert torch.equal(windows, reference_windows(SHAPES, ref_size=2))


def test_wrong_channels_raise() -> None:
    with pytest.raises(ValueError, match='multiple of 4, got 6'):
        BoxPositionalEncoding(6)


def test_shapes_on_device() -> None:
    shapes = shapes_on_device(SHAPES, torch.device('cpu'))
    assert shapes.dtype == torch.int64
    assert shapes.tolist() == [list(shape) for shape in SHAPES]
    assert shapes_on_device(shapes, torch.device('cpu')) is shapes


def test_windows_3d() -> None:
    windows = reference_windows_3d([(3, 5), (2, 2)], ref_size=4)
    assert windows.shape == (1, 19, 8, 5)
    assert torch.equal(windows[0, 15:, 0], windows[0, 15:, 7].index_fill(-1, torch.tensor(4), 0.5))
    torch.testing.assert_close(windows[0, 7, 3, :4], torch.tensor([2.5 / 5, 1.5 / 3, 4 / 5, 4 / 3]))
    angles = windows[0, 7, :, 4] * 2 * math.pi - math.pi
    third = 2 * math.pi / 3
    expected = torch.tensor([0, third, -third, 0, third, -third, 0, math.pi])
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-6)
