"""Products with, and weighted sums of, the rows that an index names: in plain PyTorch, without gathered rows.

Three functions that are each other's derivatives, for rows ``x [B, H, N, D]``, a table ``[B, H, M, D]``, weights
``w [B, H, N, K]`` and an index ``i [B, N, K]`` that all heads share::

    products(x, table, i)[n, k] = x[n] . table[i[n, k]]
    sums(w, table, i)[n]        = sum over k of  w[n, k] * table[i[n, k]]
    spread(w, x, i)[m]          = sum over n, k with i[n, k] == m of  w[n, k] * x[n]

``sums`` is an embedding bag with weights, ``products`` the gradient of its weights, and ``spread`` an embedding bag
over the sorted index, which adds up in a fixed order.  Nothing of size N * K * D exists.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm.ops import _registration
from boltz_mm.ops._backend import has_native_operators

Inverse = tuple[Tensor, Tensor]


def invert(index: Tensor, length: int) -> Inverse:
    """For every row of the table the places of the index that name it.

    Args:
        index: ``[B, N, K]`` integers in ``0 .. length - 1``.
        length: M.

    Returns:
        ``order [B, N * K]``, the places ``n * K + k`` sorted by the row that they name, and ``start [B, M]``, the first
        of each row.
    """
    batch, count = index.shape[0], index.shape[1] * index.shape[2]
    images = torch.arange(batch, device=index.device)[:, None]
    rows, order = (index.long().flatten(1) + images * length).flatten().sort(stable=True)
    start = torch.searchsorted(rows, torch.arange(batch * length, device=index.device))
    return order.view(batch, count) - images * count, start.view(batch, length) - images * count


def _of_heads(places: Tensor, heads: int, length: int) -> Tensor:
    """Indices ``[B, ...]`` into an image's rows as indices ``[B, H, ...]`` into the rows of all images and heads."""
    batch = places.shape[0]
    first = torch.arange(batch * heads, device=places.device).view(batch, heads, *[1] * (places.dim() - 1)) * length
    return places.unsqueeze(1) + first


def _products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    batch, heads, queries, depth = rows.shape
    count = index.shape[2]
    shape = batch, heads, queries, count
    if rows.numel() == 0 or count == 0 or table.numel() == 0:
        return rows.new_zeros(shape)
    flat = _of_heads(index.long(), heads, table.shape[2]).flatten()
    bags = torch.arange(batch * heads * queries, device=rows.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.reshape(-1, depth), table.reshape(-1, depth), flat, bags * count, bags.repeat_interleave(count), 0
    ).view(shape)


def _sums(weights: Tensor, table: Tensor, index: Tensor) -> Tensor:
    batch, heads, queries, count = weights.shape
    shape = batch, heads, queries, table.shape[3]
    if weights.numel() == 0 or table.numel() == 0:
        return weights.new_zeros(shape)
    flat = _of_heads(index.long(), heads, table.shape[2]).view(-1, count)
    return F.embedding_bag(
        flat, table.reshape(-1, shape[3]), mode='sum', per_sample_weights=weights.reshape(-1, count)
    ).view(shape)


def _spread(weights: Tensor, rows: Tensor, index: Tensor, length: int, inverse: Inverse | None) -> Tensor:
    batch, heads, queries, count = weights.shape
    shape = batch, heads, length, rows.shape[3]
    if weights.numel() == 0 or rows.numel() == 0 or length == 0:
        return rows.new_zeros(shape)
    order, start = invert(index, length) if inverse is None else inverse
    places = _of_heads(order, heads, queries * count).flatten()
    return F.embedding_bag(
        _of_heads(order // count, heads, queries).flatten(),
        rows.reshape(-1, shape[3]),
        _of_heads(start, heads, queries * count).flatten(),
        mode='sum',
        per_sample_weights=weights.flatten()[places],
    ).view(shape)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, index: Tensor, *inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, table, index, *inverse)
        return _products(rows, table, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, table, index, *inverse = ctx.saved_tensors
        known = (inverse[0], inverse[1]) if inverse else None
        grad_rows = _sums(grad, table, index) if ctx.needs_input_grad[0] else None
        grad_table = _spread(grad, rows, index, table.shape[2], known) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_table, None, *[None] * len(inverse)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, index: Tensor, *inverse: Tensor) -> Tensor:
        ctx.save_for_backward(weights, table, index, *inverse)
        return _sums(weights, table, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, table, index, *inverse = ctx.saved_tensors
        known = (inverse[0], inverse[1]) if inverse else None
        grad_weights = _products(grad, table, index) if ctx.needs_input_grad[0] else None
        grad_table = _spread(weights, grad, index, table.shape[2], known) if ctx.needs_input_grad[1] else None
        return grad_weights, grad_table, None, *[None] * len(inverse)


def products(rows: Tensor, table: Tensor, index: Tensor, inverse: Inverse | None = None) -> Tensor:
    """Products ``[B, H, N, K]`` of the rows ``[B, H, N, D]`` with those rows of the table that the index names.

    Args:
        rows: ``[B, H, N, D]``, float32 or float64.
        table: ``[B, H, M, D]``.
        index: ``[B, N, K]`` integers.
        inverse: :func:`invert` of the index where it is known; otherwise backward finds it.
    """
    result: Tensor = _Products.apply(rows, table, index, *(inverse or ()))
    return result


def sums(weights: Tensor, table: Tensor, index: Tensor, inverse: Inverse | None = None) -> Tensor:
    """Weighted sums ``[B, H, N, D]`` of the rows of the table that the index names.

    Args:
        weights: ``[B, H, N, K]``, float32 or float64.
        table: ``[B, H, M, D]``.
        index: ``[B, N, K]`` integers.
        inverse: :func:`invert` of the index where it is known; otherwise backward finds it.
    """
    result: Tensor = _Sums.apply(weights, table, index, *(inverse or ()))
    return result


# --------------------------------------------------------------------------------------------------------- native ----
# Each one's derivatives are the other two, so that they can be differentiated any number of times.


def _fake_products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:3], index.shape[2])


def _fake_sums(weights: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return weights.new_empty(*weights.shape[:3], table.shape[3])


def _fake_spread(weights: Tensor, rows: Tensor, index: Tensor, length: int) -> Tensor:
    return rows.new_empty(*rows.shape[:2], length, rows.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_products(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, table, index = ctx.saved_tensors
    needs_rows, needs_table, _ = ctx.needs_input_grad
    grad_rows = torch.ops.boltz_mm.neighbor_sums(grad, table, index) if needs_rows else None
    spread = torch.ops.boltz_mm.neighbor_spread
    return grad_rows, spread(grad, rows, index, table.shape[2]) if needs_table else None, None


def _backward_sums(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, table, index = ctx.saved_tensors
    needs_weights, needs_table, _ = ctx.needs_input_grad
    grad_weights = torch.ops.boltz_mm.neighbor_products(grad, table, index) if needs_weights else None
    spread = torch.ops.boltz_mm.neighbor_spread
    return grad_weights, spread(weights, grad, index, table.shape[2]) if needs_table else None, None


def _backward_spread(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, rows, index = ctx.saved_tensors
    needs_weights, needs_rows = ctx.needs_input_grad[:2]
    grad_weights = torch.ops.boltz_mm.neighbor_products(rows, grad, index) if needs_weights else None
    return grad_weights, torch.ops.boltz_mm.neighbor_sums(weights, grad, index) if needs_rows else None, None, None


def _flops(first: Any, second: Any, index: Any, *args: Any, **kwargs: Any) -> int:
    """A multiply-add for each neighbour, head and channel; the channels are those of the second input."""
    batch, heads, _, depth = second
    return 2 * batch * heads * index[1] * index[2] * depth


if has_native_operators():
    for _name, _fake, _backward in (
        ('neighbor_products', _fake_products, _backward_products),
        ('neighbor_sums', _fake_sums, _backward_sums),
        ('neighbor_spread', _fake_spread, _backward_spread),
    ):
        _registration.register(_name, fake=_fake, setup_context=_setup, backward=_backward, flops=_flops)
