"""Argument checks that the operators share, and the dtype in which they compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Shapes = Tensor | Sequence[tuple[int, int]]


def compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype of coordinates, softmax and sums: float64 for float64 values, otherwise float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def check_float(name: str, tensor: Tensor, device: torch.device) -> None:
    """Require a tensor of a supported floating-point dtype on ``device``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if tensor.dtype not in DTYPES:
        raise TypeError(f'{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}')
    if tensor.device != device:
        raise ValueError(f'{name} is on {tensor.device}, value on {device}')


def check_shape(name: str, tensor: Tensor, meaning: str, expected: Sequence[int]) -> None:
    """Require ``tensor.shape == expected``; ``meaning`` names the sizes in the message."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f'{name} must have shape {meaning} = {list(expected)}, got {list(tensor.shape)}')


def check_value(value: Tensor) -> None:
    """Require a floating-point ``value`` of shape ``[B, S, H, D]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f'value must be a tensor, got {type(value).__name__}')
    check_float('value', value, value.device)
    if value.dim() != 4:
        raise ValueError(f'value must have shape [B, S, H, D], got {list(value.shape)}')


def as_shapes_tensor(spatial_shapes: Shapes, value: Tensor) -> Tensor:
    """Level sizes as an int64 tensor ``[L, 2]`` on the device of ``value``.

    The sizes are held against the length of ``value`` where that needs no synchronisation, that is on the CPU.

    Raises:
        TypeError: ``spatial_shapes`` are no integers.
        ValueError: Not of shape ``[L, 2]``, negative, or not adding up to S.
    """
    if not isinstance(spatial_shapes, Tensor):
        spatial_shapes = torch.tensor(
            [[int(height), int(width)] for height, width in spatial_shapes], dtype=torch.int64
        ).reshape(-1, 2)
    if spatial_shapes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f'spatial_shapes must be int64 or int32, got {spatial_shapes.dtype}')
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(f'spatial_shapes must have shape [L, 2], got {list(spatial_shapes.shape)}')
    if spatial_shapes.device.type == 'cpu' and not torch.compiler.is_compiling() and type(spatial_shapes) is Tensor:
        _check_levels(spatial_shapes.tolist(), value.shape[1])
    return spatial_shapes.to(device=value.device, dtype=torch.int64)


def _check_levels(shapes: list[list[int]], length: int) -> None:
    if any(height < 0 or width < 0 for height, width in shapes):
        raise ValueError(f'spatial_shapes must not be negative, got {shapes}')
    total = sum(height * width for height, width in shapes)
    if total != length:
        raise ValueError(f'spatial_shapes {shapes} have {total} cells, but value has {length}')
