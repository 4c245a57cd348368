"""What every native operator registers in Python: shapes, autograd, FLOPs and the rule for ``torch.vmap``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Register the Python parts of the forward operator ``boltz_mm::name``."""
    qualified = f'boltz_mm::{name}'
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    register_flop_formula(getattr(torch.ops.boltz_mm, name))(flops)


def register_backward(name: str, *, fake: Callable[..., Any], flops: Callable[..., int]) -> None:
    """Register the Python parts of a backward operator: it cannot be differentiated itself, and says so."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f'boltz_mm::{name} has no derivative: the operator can be differentiated once only')

    qualified = f'boltz_mm::{name}'
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, refuse)
    register_flop_formula(getattr(torch.ops.boltz_mm, name))(flops)


def register_vmap(name: str, *, constant: tuple[str, ...]) -> None:
    """Let ``torch.vmap`` fold its dimension into the batch, the first dimension of every tensor but the constant ones.

    Args:
        name: Operator in ``torch.ops.boltz_mm``.
        constant: Names of tensor arguments without a batch dimension; mapping over them raises ``NotImplementedError``.
    """
    operator = getattr(torch.ops.boltz_mm, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        folded = []
        for argument, value, dim in zip(names, args, in_dims, strict=True):
            if argument in constant and dim is not None:
                raise NotImplementedError(f'boltz_mm::{name} cannot be mapped over {argument}')
            folded.append(value if argument in constant else _fold(value, dim, info.batch_size))
        results = operator(*folded)
        many = results if isinstance(results, tuple) else (results,)
        unfolded = tuple(_unfold(result, info.batch_size) for result in many)
        return (unfolded, (0,) * len(unfolded)) if isinstance(results, tuple) else (unfolded[0], 0)

    torch.library.register_vmap(f'boltz_mm::{name}', rule)


def _fold(value: Any, dim: int | None, size: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


def _unfold(value: Tensor, size: int) -> Tensor:
    # A tensor of size 0 stands for a result that was not asked for.
    return value.new_empty(size, 0) if value.dim() == 1 else value.unflatten(0, (size, -1))
