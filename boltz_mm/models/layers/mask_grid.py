"""Masks on a grid of a box: targets sampled from full-image masks, and predictions pasted back into the image.

Source: BoxeR, official file ``utils/general.py`` (``extract_grid``, ``paste_grid``) and the post-processing of
``dataset/coco.py``.  Same numbers, deviations in how they are reached:

* Sampling gathers the four neighbours of each point from the masks as they are (bool or uint8, on the CPU if they lie
  there), in place of a float copy of every full-image mask.
* Pasting evaluates the pixels near a box only, one object at a time, in place of 100 full-image sampling grids.
* An empty pasted mask has quality 0, officially 0 / 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_masks(masks: Tensor, boxes: Tensor, grid_size: int) -> Tensor:
    """Sample each mask bilinearly on a regular grid of its box; zero outside the mask.

    Args:
        masks: ``[n, H, W]``, bool, integer or floating, one per object.
        boxes: ``[n, 4]`` (cx, cy, w, h), normalised by (W, H).
        grid_size: Points per side, m; point k lies at ``(k + 0.5) / m`` of the box.

    Returns:
        Values ``[n, m, m]`` in the dtype of ``boxes``.
    """
    height, width = masks.shape[-2:]
    steps = (torch.arange(grid_size, dtype=boxes.dtype, device=boxes.device) + 0.5) / grid_size
    centre, size = boxes[:, :2], boxes[:, 2:]
    corner = centre - 0.5 * size  # [n, 2]
    points = corner[:, None] + steps[:, None] * size[:, None]  # [n, m, 2]
    x = _pixel_index(points[..., 0], width)[:, None, :]  # [n, 1, m]
    y = _pixel_index(points[..., 1], height)[:, :, None]  # [n, m, 1]
    x0, y0 = x.floor(), y.floor()
    a, b = x - x0, y - y0
    corners = ((0, 0, (1 - b) * (1 - a)), (0, 1, (1 - b) * a), (1, 0, b * (1 - a)), (1, 1, b * a))
    objects = torch.arange(len(masks), device=masks.device)[:, None, None]
    values = boxes.new_zeros(len(masks), grid_size, grid_size)
    for dy, dx, weight in corners:
        column, row = x0.long() + dx, y0.long() + dy
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        if height and width:
            taken = masks[objects, row.clamp(0, height - 1), column.clamp(0, width - 1)]
            values = values + weight * (taken.to(values.dtype) * inside)
    return values


def _pixel_index(points: Tensor, size: int) -> Tensor:
    """Continuous pixel index of a coordinate in 0..1, in the order of operations of ``grid_sample`` on the CPU."""
    return (points * 2 - 1 + 1) * (size / 2) - 0.5


def mask_targets(masks: Tensor, boxes: Tensor, grid_size: int) -> Tensor:
    """Binary targets ``[n, m, m]`` (0 or 1 in the dtype of ``boxes``): :func:`sample_masks` at 0.5 or more."""
    return (sample_masks(masks, boxes, grid_size) >= 0.5).to(boxes.dtype)


def paste_mask(probs: Tensor, box: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, tuple[slice, slice]]:
    """Spread the mask of one box over the pixels that it reaches.

    Pixel (x, y) takes the bilinear value at ``((x + 0.5 - x1) / (x2 - x1), (y + 0.5 - y1) / (y2 - y1))`` of the mask,
    which fades to zero half a mask cell outside the box.

    Args:
        probs: ``[m, m]`` values on the grid of the box.
        box: ``[4]`` (x1, y1, x2, y2) in pixels, may reach outside the image.
        image_size: (H, W).

    Returns:
        The values ``[h, w]`` of the reached part of the image and its (rows, columns); every other pixel is zero.
    """
    ranges, grids = [], []
    for low, high, size, cells in ((box[1], box[3], image_size[0], probs.shape[0]),
                                   (box[0], box[2], image_size[1], probs.shape[1])):  # fmt: skip
        start, stop = _reach(float(low), float(high), size, cells)
        pixels = torch.arange(start, stop, dtype=probs.dtype, device=probs.device) + 0.5
        ranges.append(slice(start, stop))
        grids.append((pixels - low) / (high - low) * 2 - 1)
    rows, columns = grids
    if not (len(rows) and len(columns)):
        return probs.new_zeros(len(rows), len(columns)), (ranges[0], ranges[1])
    grid = torch.stack([columns[None].expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], dim=-1)
    values = F.grid_sample(probs[None, None], grid[None], mode='bilinear', padding_mode='zeros', align_corners=False)
    return values[0, 0], (ranges[0], ranges[1])


def _reach(low: float, high: float, size: int, cells: int) -> tuple[int, int]:
    """First and one past the last pixel that a box side may touch, with a pixel to spare."""
    if not high > low:  # also NaN: a degenerate box covers nothing
        return 0, 0
    fade = (high - low) / (2 * cells) + 1
    start, stop = max(low - fade, 0.0), min(high + fade, float(size))
    return (int(start), min(int(stop) + 1, size)) if stop > start else (0, 0)


def paste_masks(probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Binary full-image masks of boxes, and how sure the model is of them.

    Args:
        probs: ``[n, m, m]`` probabilities on the grids of the boxes.
        boxes: ``[n, 4]`` (x1, y1, x2, y2) in pixels.
        image_size: (H, W).

    Returns:
        Masks ``[n, H, W]`` bool (probability 0.5 or more) and qualities ``[n]``: the mean probability inside each
        mask, 0 for an empty mask.
    """
    masks = torch.zeros(len(boxes), *image_size, dtype=torch.bool, device=probs.device)
    qualities = probs.new_zeros(len(boxes))
    on_host = boxes.cpu()  # one transfer, in place of one for each pixel range
    for i in range(len(boxes)):
        values, (rows, columns) = paste_mask(probs[i], on_host[i].to(probs.dtype), image_size)
        inside = values >= 0.5
        masks[i, rows, columns] = inside
        qualities[i] = (values * inside).sum() / inside.sum().clamp(min=1)
    return masks, qualities
