"""Cluster attention in the fastest exact PyTorch that we found: embedding bags, and what blocks share computed once.

The reference of :mod:`boltz_mm.ops.cluster_attention` already avoids gathered rows; this form goes further, as one
would who writes a model and no operator:

* the flat index of all heads, the offsets and the inverse of the index are made once for a stage, not for a block;
* the blank token is one more row of keys and values, so nothing is concatenated per neighbour;
* in inference the position bias is looked up in a table of the offsets that occur, in training it is a product with
  their features, whichever is faster in that direction (and where there are fewer pairs than offsets, always);
* gradients of keys and values are embedding bags over the inverted index.

``tools/benchmark/models.py --model aff_attention`` times it against other forms; it won in both directions at all sizes
but the forward pass at 196 tokens (2 cores of a shared x86-64 server, torch 2.13 CPU).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm import ops
from boltz_mm.ops import _neighbor_sums, offset_features


class Plan(NamedTuple):
    """What the blocks of a stage share.

    Attributes:
        index: ``[B, N, K + 1]`` int64, rows of the keys, the last one being the blank token's.
        flat: ``[B * H * N, K + 1]``, the same for the rows of all images and heads.
        bags: ``[B * H * N]``, where each bag begins.
        owner: ``[B * H * N * (K + 1)]``, the bag of each entry.
        inverse: See :func:`boltz_mm.ops._neighbor_sums.invert`; ``None`` in inference.
        features: ``[6, R]``: five features and 1 for each offset, 0 for the blank token.
        rows: ``[B * N * (K + 1)]``, column of ``features`` of each entry; ``None`` where they are in order.
        added: ``[B, 1, N, K + 1]``, -100 for padding; ``None`` without.
        keep: The tensors by whose address the plan is found, so that no other gets it.
    """

    index: Tensor
    flat: Tensor
    bags: Tensor
    owner: Tensor
    inverse: tuple[Tensor, Tensor] | None
    features: Tensor
    rows: Tensor | None
    added: Tensor | None
    keep: tuple[Tensor, ...]


def make_plan(
    query_pos: Tensor, key_pos: Tensor, nearest: Tensor | None, size: int, bound: int | None, shape: tuple, train: bool
) -> Plan:
    """Plan for ``shape = (B, N, H, M)``."""
    batch, queries, heads, keys = shape
    if nearest is None:
        members = torch.arange(keys).expand(batch, queries, -1)
    else:
        members = (nearest.long()[..., None] * size + torch.arange(size)).flatten(2).expand(batch, -1, -1)
    padded = members >= keys
    members = torch.where(padded, 0, members)
    count = members.shape[2] + 1
    index = F.pad(members, (0, 1), value=keys)
    flat = _neighbor_sums._of_heads(index, heads, keys + 1).view(-1, count)
    bags = torch.arange(len(flat)) * count
    owner = torch.arange(len(flat)).repeat_interleave(count)
    at = key_pos.expand(batch, -1, -1).gather(1, members.reshape(batch, -1, 1).expand(-1, -1, 2))
    offset = at.view(batch, queries, -1, 2) - query_pos.unsqueeze(2)
    if bound is not None:
        offset = offset.clamp(-bound, bound)
    reach = offset.abs().amax((0, 1, 2)).long()
    width, height = (2 * reach + 1).tolist()
    rows = None
    if not train and width * height < offset[..., 0].numel():
        y, x = torch.meshgrid(torch.arange(height) - reach[1], torch.arange(width) - reach[0], indexing='ij')
        rows = ((offset[..., 1] + reach[1]) * width + offset[..., 0] + reach[0]).long()
        rows = F.pad(rows, (0, 1), value=width * height).flatten()
        features = F.pad(offset_features(torch.stack([x, y], -1).view(-1, 2).float()), (0, 1), value=1.0)
        features = F.pad(features, (0, 0, 0, 1))
    else:
        features = F.pad(offset_features(offset), (0, 1), value=1.0)
        features = F.pad(features, (0, 0, 0, 1)).view(-1, 6)
    added = F.pad(torch.where(padded, -100.0, 0.0), (0, 1)).unsqueeze(1) if bool(padded.any()) else None
    inverse = None
    if train:
        order, start = _neighbor_sums.invert(index, keys + 1)
        inverse = (
            _neighbor_sums._of_heads(order, heads, queries * count).flatten(),
            _neighbor_sums._of_heads(start, heads, queries * count).flatten(),
        )
    keep = tuple(t for t in (query_pos, key_pos, nearest) if t is not None)
    return Plan(index, flat, bags, owner, inverse, features.t().contiguous(), rows, added, keep)


def _products(rows: Tensor, table: Tensor, plan: Plan) -> Tensor:
    """``[B * H * N, K + 1]``."""
    out = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, table, plan.flat.flatten(), plan.bags, plan.owner, 0
    )
    return out.view(plan.flat.shape)


def _sums(weights: Tensor, table: Tensor, plan: Plan) -> Tensor:
    """``[B * H * N, D]``."""
    return F.embedding_bag(plan.flat, table, mode='sum', per_sample_weights=weights)


def _spread(weights: Tensor, rows: Tensor, plan: Plan) -> Tensor:
    """``[B * H * (M + 1), D]``."""
    order, start = plan.inverse
    return F.embedding_bag(
        order // plan.flat.shape[1], rows, start, mode='sum', per_sample_weights=weights.flatten()[order]
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, plan: Plan) -> Tensor:
        weights = _products(query, key, plan).add_(bias).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.plan = plan
        return _sums(weights, value, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_weights = torch._softmax_backward_data(_products(grad, value, ctx.plan), weights, -1, weights.dtype)
        return (
            _sums(of_weights, key, ctx.plan),
            _spread(of_weights, query, ctx.plan),
            _spread(weights, grad, ctx.plan),
            of_weights,
            None,
        )


class BagAttention:
    """Stands in for :func:`boltz_mm.ops.cluster_attention`; keeps the plans of one pass."""

    def __init__(self) -> None:
        self._plans: dict[tuple, Plan] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        query_pos: Tensor,
        key_pos: Tensor,
        nearest: Tensor | None,
        cluster_size: int = 1,
        bias_weight: Tensor,
        bias: Tensor,
        blank_key: Tensor,
        blank_value: Tensor,
        scale: float = 1.0,
        max_offset: int | None = None,
    ) -> Tensor:
        """As :func:`boltz_mm.ops.cluster_attention`, with all of its parameters."""
        batch, queries, heads, depth = query.shape
        shape = batch, queries, heads, key.shape[1]
        addresses = tuple(0 if t is None else t.data_ptr() for t in (query_pos, key_pos, nearest))
        name = (addresses, shape, torch.is_grad_enabled())
        if name not in self._plans:
            self._plans[name] = make_plan(
                query_pos, key_pos, nearest, cluster_size, max_offset, shape, torch.is_grad_enabled()
            )
        plan = self._plans[name]
        table = torch.cat([bias_weight, bias[:, None]], 1) @ plan.features  # [H, R]
        if plan.rows is not None:
            table = table.index_select(1, plan.rows)
        added = table.view(heads, -1, queries, plan.flat.shape[1]).transpose(0, 1)
        if added.shape[0] != batch or plan.added is not None:
            added = added.expand(batch, -1, -1, -1) if plan.added is None else added + plan.added
        rows = (query * scale).transpose(1, 2).reshape(-1, depth)
        keys, values = (
            torch.cat([part.transpose(1, 2), blank.view(1, heads, 1, depth).expand(batch, -1, -1, -1)], 2).flatten(0, 2)
            for part, blank in ((key, blank_key), (value, blank_value))
        )
        out = _Attention.apply(rows, keys, values, added.reshape(plan.flat.shape), plan)
        return out.view(batch, heads, queries, depth).transpose(1, 2).flatten(2)


@contextmanager
def bag_attention() -> Iterator[None]:
    """Let models of ours run on :class:`BagAttention` inside; one pass at a time."""
    before = ops.cluster_attention
    ops.cluster_attention = BagAttention()
    try:
        yield
    finally:
        ops.cluster_attention = before
