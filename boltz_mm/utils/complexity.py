"""Operations and parameters of a model, our operators included, on both of their backends.

torch's ``FlopCounterMode`` counts matrix products and convolutions, and every operator that has registered a formula,
as ours have.  Four things would slip through, and are mended here: the attention kernel that torch chooses on a CPU
(``_scaled_dot_product_flash_attention_for_cpu`` has no formula), the fused inference path of
``nn.MultiheadAttention`` (switched off while counting), bilinear sampling and embedding bags, which is what the torch
reference of our operators consists of (it then lacks only the sums over the samples of mask features).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_BILINEAR = 8  # four products and sums for each sampled number


def _grid_sample_flop(
    input_shape: Any, grid_shape: Any, *args: Any, out_shape: tuple[int, ...] = (), **kwargs: Any
) -> int:
    return _BILINEAR * torch.Size(out_shape).numel()


def _sdpa_flop(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query_shape, key_shape, value_shape))


def _bag_flop(table_shape: Any, index_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(index_shape).numel() * int(table_shape[-1])


def _bag_weights_flop(grad_shape: Any, table_shape: Any, index_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _bag_flop(table_shape, index_shape)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flop,
    torch.ops.aten.grid_sampler_2d: _grid_sample_flop,
    torch.ops.aten.cudnn_grid_sampler: _grid_sample_flop,
    torch.ops.aten._embedding_bag: _bag_flop,
    torch.ops.aten._embedding_bag_forward_only: _bag_flop,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_weights_flop,
}


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What a forward pass costs.

    Attributes:
        flops: Floating-point operations; a multiplication and an addition are two.
        by_operator: The same for each operator, largest first.
        params: Parameters of the model.
    """

    flops: int
    by_operator: dict[str, int]
    params: int

    @property
    def macs(self) -> int:
        """Multiply-adds, what papers and mmdet's tool call FLOPs."""
        return self.flops // 2


@torch.no_grad()
def count_complexity(model: nn.Module, forward: Callable[[], Tensor | Any]) -> Complexity:
    """Count the operations of one call.

    Args:
        model: Whose parameters to count.
        forward: Runs the model once.

    Returns:
        The counts.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    counts = counter.get_flop_counts().get('Global', {})
    by_operator = {str(name): int(count) for name, count in sorted(counts.items(), key=lambda item: -item[1])}
    params = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(sum(by_operator.values()), by_operator, params)


def published_aff_macs(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    ds_rate: float,
    img_size: int,
    num_classes: int = 1000,
) -> int:
    """Multiply-adds of an AutoFocusFormer classifier by the rule behind the published figures.

    The rule is that of ptflops 0.6.9 on the official modules, for one square image: convolutions and linear maps with
    their biases (a linear map's once, not for each token), batch norm as two operations and GELU as one for each
    number; no layer norms, no products of queries, keys and values (neither among neighbours nor in the global last
    stage), no merging sums, no search for neighbours.  The tables of relative positions count in full, once for each
    block and each reduction, although :class:`~boltz_mm.models.backbones.aff.AFF` has no tables.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratio: Channels inside an MLP as a multiple of those outside.
        ds_rate: Share of tokens that a stage hands on.
        img_size: Height and width of the image.
        num_classes: Outputs of the classifier.

    Returns:
        The count; published in units of 10**9.
    """
    half, side = -(-img_size // 2), -(-img_size // 4)
    stem, width = embed_dims[0] // 2, embed_dims[0]
    macs = half**2 * stem * (3 * 9 + 1 + 2 + 1)  # convolution, its bias, norm, activation
    tokens = side**2
    macs += tokens * width * (stem * 9 + 1)
    table = (2 * (img_size // 4) - 1) ** 2
    for stage, (width, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
        hidden = int(width * mlp_ratio)
        outputs = (width, 2 * width, width, hidden)  # q, kv, proj, first of the MLP: all from ``width``
        block = tokens * (width * sum(outputs) + hidden * width + hidden) + sum(outputs) + width
        macs += depth * (block + table * 5 * heads + heads)
        if stage + 1 < len(embed_dims):
            following = embed_dims[stage + 1]
            macs += tokens * width + 1  # importance
            macs += table * (5 * 4 + 4) + 4  # weights of the merge
            tokens = int(tokens * ds_rate)
            macs += tokens * 4 * width * following + following
    return macs + embed_dims[-1] * num_classes + num_classes
