"""Weighted sums over the neighbours of points, with weights that an offset or the caller gives.

Source: "AutoFocusFormer: Image Segmentation off the Grid" (arXiv 2304.12406), section 3; official files
``aff_transformer.py`` and ``clusten.py``.
"""

import torch
from torch import Tensor

from boltz_mm.ops._checks import DTYPES


def offset_features(offset: Tensor) -> Tensor:
    """The five numbers by which AutoFocusFormer describes an offset: ``dx, dy, d, dy / d, dx / d``.

    ``d`` is the length of the offset.  The ratios of an offset of length 0 are 0.  It is what the official lookup table
    (``build_pe_lookup``) holds, for any offset.

    Args:
        offset: ``[..., 2]`` (dx, dy); integers count as float32.

    Returns:
        ``[..., 5]`` in the dtype of ``offset``; 16-bit types are computed in float32.  The gradient at an offset of
        length 0 is that of dx and dy alone.

    Raises:
        TypeError: ``offset`` is complex or boolean.
        ValueError: The last dimension is not 2.
    """
    if offset.dtype == torch.bool or offset.is_complex():
        raise TypeError(f'offset must be real numbers, got {offset.dtype}')
    if offset.dim() == 0 or offset.shape[-1] != 2:
        raise ValueError(f'offset must have shape [..., 2], got {list(offset.shape)}')
    dtype = offset.dtype if offset.dtype in DTYPES else torch.float32
    dx, dy = offset.to(torch.float64 if dtype == torch.float64 else torch.float32).unbind(-1)
    squared = dx * dx + dy * dy
    is_zero = squared == 0
    # The square root has no derivative at 0, so that 0 must not reach it.
    length = torch.where(is_zero, 1, squared).sqrt()
    distance = torch.where(is_zero, 0, length)
    return torch.stack([dx, dy, distance, dy / length, dx / length], -1).to(dtype)
