"""Precision of intermediate results."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, float32 if it was float16 or bfloat16; coordinates, logits and losses need that under autocast."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
