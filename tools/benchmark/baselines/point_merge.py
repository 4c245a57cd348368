"""AutoFocusFormer's weighted merge as one would write it in PyTorch: what the operator is timed against.

Two forms: gathered features times weights, as the official tests have it, and ``embedding_bag``, the fastest forward
that we found.  Both build indices, offsets and weights of all neighbours.  ``tests/benchmark`` holds them by the
operator.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm.ops import offset_features


def _members(place: dict[str, Any]) -> Tensor:
    if 'index' in place:
        return place['index'].long()
    size = place['cluster_size']
    return (place['nearest'].long().unsqueeze(-1) * size + torch.arange(size, device=place['nearest'].device)).flatten(
        2
    )


def _weights(rows: Tensor, parameters: list[Tensor], place: dict[str, Any]) -> Tensor:
    """Weights ``[1, N, K, I]`` of the neighbours ``rows [1, N, K]``."""
    weight, bias, norm_weight, norm_bias, *importance = parameters
    offset = (place['key_pos'][0][rows] - place['query_pos'].unsqueeze(2)) * place.get('sign', 1)
    five = offset_features(offset)
    weights = F.gelu(F.layer_norm(F.linear(five, weight, bias), bias.shape, norm_weight, norm_bias))
    return weights * importance[0][0][rows].unsqueeze(-1) if importance else weights


def gathered(feat: Tensor, *parameters: Tensor, **place: Any) -> Tensor:
    """``feat [1, M, C]`` merged to ``[1, N, I * C]`` over gathered rows."""
    rows = _members(place)
    weights = _weights(rows, list(parameters), place).to(feat.dtype)
    return torch.matmul(weights.transpose(2, 3), feat[0][rows]).flatten(2)


def bags(feat: Tensor, *parameters: Tensor, **place: Any) -> Tensor:
    """The same with ``embedding_bag``, which gathers nothing; in float32."""
    rows = _members(place)
    weights = _weights(rows, list(parameters), place)
    _, points, count, inner = weights.shape
    entries = rows.unsqueeze(2).expand(-1, -1, inner, -1).reshape(-1, count)
    in_bags = weights.transpose(2, 3).reshape(-1, count)
    sums = F.embedding_bag(entries, feat[0].to(weights.dtype), per_sample_weights=in_bags, mode='sum')
    return sums.view(1, points, -1).to(feat.dtype)
