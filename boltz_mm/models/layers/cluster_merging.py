"""Adaptive downsampling: keep the tokens with the highest scores and merge their neighbourhoods into them.

Source: AutoFocusFormer (CVPR 2023, section 3.4) and the official file ``aff_transformer.py`` (``ClusterMerging``).
Parameter names are the official ones.

Deviations from the official code, where that is undefined or fails:

* Order of the kept tokens: descending score, the reserved ones last in ascending index.  Officially the first part
  comes in the order of an unsorted top-k; it decides which of several equally near tokens is a neighbour later on.
  Of tokens of equal score the one with the lowest index comes first.
* At least the reserved tokens are kept, and at least one (officially small images raise an error).
* A token without neighbours (an image of one token) is on the coarse grid, and global attention (no clusters) is a
  neighbourhood of all tokens.
* A NaN importance counts as 0 in the selection; the features it is merged into become NaN.
"""

from typing import cast

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.models.layers.cluster_attention import Neighborhood

RESERVED_PENALTY = 100.0
"""What the official score subtracts from reserved tokens, which are kept in any case."""


def is_multiple(pos: Tensor, step: Tensor | int) -> Tensor:
    """Whether both coordinates are multiples of a power of two.

    Args:
        pos: ``[B, N, 2]``, integers >= 0 as floats.
        step: The power of two, or ``[B, N]`` int64 of them.

    Returns:
        Bool tensor ``[B, N]``.
    """
    x, y = pos.long().unbind(-1)
    return ((x | y) & (step - 1)) == 0


def grid_prior(pos: Tensor, stride: int, canvas: tuple[int, int]) -> Tensor:
    """The part of the score that prefers tokens of a regular grid, coarse where tokens are sparse.

    On the full grid (``stride`` 2) a token has 1 if both coordinates are even.  Later it has 1 if both are multiples
    of ``2^(ceil(log2 d) + 1)``, d being its distance to the nearest other token.

    Args:
        pos: Float tensor ``[B, N, 2]`` in stride-4 cells, no two alike in an image.
        stride: 2, 4, 8, ... for the first, second, third stage.
        canvas: Rows and columns of the stride-4 grid.

    Returns:
        Float tensor ``[B, N]`` of zeros and ones, dtype of ``pos``.
    """
    if stride == 2:
        return is_multiple(pos, 2).to(pos.dtype)
    if pos.shape[1] < 2:
        return pos.new_ones(pos.shape[:2])
    distance = ops.nearest_other_distance(pos, canvas=canvas)
    # d = m * 2^e with m in [0.5, 1): ceil(log2 d) is e, or e - 1 for an exact power of two. No rounding of logarithms.
    mantissa, exponent = torch.frexp(distance)
    exponent = exponent.long() + (mantissa > 0.5)
    return is_multiple(pos, torch.ones_like(exponent) << exponent).to(pos.dtype)


def count_reserved(canvas: tuple[int, int], stride: int) -> int:
    """Number of tokens that a stage keeps in any case: those at multiples of ``2 * stride`` on a full grid."""
    step = 2 * stride
    return -(-canvas[0] // step) * -(-canvas[1] // step)


def select_tokens(score: Tensor, keep: int, reserved: Tensor | None = None) -> Tensor:
    """Indices of the tokens with the highest scores.

    Ties go to the lowest index.  Nothing is read back from the device.

    Args:
        score: Float tensor ``[B, N]``; NaN counts as the lowest.
        keep: Number of tokens kept, 1 <= keep <= N.
        reserved: Bool tensor ``[B, N]``, kept whatever their score, at most ``keep`` of them.

    Returns:
        Int64 tensor ``[B, keep]``: by descending score, those reserved after the others in ascending order.

    Raises:
        ValueError: ``keep`` is out of range.
    """
    length = score.shape[1]
    if not 1 <= keep <= length:
        raise ValueError(f'cannot keep {keep} of {length} tokens')
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.finfo(score.dtype).max)
    if reserved is not None:
        score = score.masked_fill(reserved, torch.inf)
    # Reserved tokens come first, in the order of their indices; then they change places with the others.
    kept = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
    if reserved is None:
        return kept
    return kept.gather(1, reserved.gather(1, kept).byte().argsort(dim=1, stable=True))


class ClusterMerging(BaseModule):
    """Keep a share of the tokens and merge their neighbourhoods into them.

    Score of a token: ``g + alpha * p`` with the grid prior g, see :func:`grid_prior`, and the importance p, detached.
    ``int(N * ds_rate)`` tokens are kept, among them all reserved ones.  A kept token i becomes
    ``linear(norm(flatten(sum_j w_ij (x) feat_j)))`` over its neighbours j, with four weights
    ``w_ij = GELU(LayerNorm(linear(five(pos_j - pos_i)))) * p_j``; here p has a gradient.

    Args:
        embed_dims: Channels C of a token.
        out_channels: Channels of a merged token.
        ds_rate: Share of the tokens that is kept, in (0, 1].
        alpha: Factor of the importance in the score.
        reserve: Whether the tokens at multiples of twice the stride are kept in any case.
        max_offset: See :class:`~boltz_mm.models.layers.cluster_attention.ClusterAttention`.
        inner_channels: Weights of a pair.
        init_cfg: Config of the initialisation.

    Raises:
        ValueError: ``ds_rate`` is not in (0, 1].
    """

    def __init__(
        self,
        embed_dims: int,
        out_channels: int,
        ds_rate: float = 0.25,
        alpha: float = 4.0,
        reserve: bool = True,
        max_offset: int | None = None,
        inner_channels: int = 4,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not 0 < ds_rate <= 1:
            raise ValueError(f'ds_rate must be in (0, 1], got {ds_rate}')
        self.ds_rate = ds_rate
        self.alpha = alpha
        self.reserve = reserve
        self.max_offset = max_offset
        # The GELU between is part of the operator.
        self.weight_net = nn.Sequential(nn.Linear(5, inner_channels), nn.LayerNorm(inner_channels))
        self.norm = nn.LayerNorm(inner_channels * embed_dims)
        self.linear = nn.Linear(inner_channels * embed_dims, out_channels)

    def score(self, prior: Tensor, importance: Tensor | None, reserved: Tensor | None = None) -> Tensor:
        """The official score.

        Args:
            prior: ``[B, N]``, see :func:`grid_prior`.
            importance: ``[B, N]``, or ``None`` for the prior alone.
            reserved: Bool ``[B, N]``.

        Returns:
            ``[B, N]``, without gradient.
        """
        score = prior if importance is None else prior + self.alpha * importance.detach().nan_to_num(nan=0.0)
        return score if reserved is None else score - RESERVED_PENALTY * reserved

    def num_kept(self, num_tokens: int, canvas: tuple[int, int], stride: int) -> int:
        """Number of tokens that a stage of ``num_tokens`` keeps."""
        reserved = count_reserved(canvas, stride) if self.reserve else 1
        return min(max(int(num_tokens * self.ds_rate), reserved), num_tokens)

    def select(
        self, pos: Tensor, importance: Tensor | None, canvas: tuple[int, int], stride: int, prior: Tensor | None = None
    ) -> Tensor:
        """Choose the tokens that are kept.

        Args:
            pos: Float32 tensor ``[B, N, 2]`` in stride-4 cells.
            importance: Float tensor ``[B, N]``, or ``None``.
            canvas: Rows and columns of the stride-4 grid.
            stride: 2, 4, 8, ... for the first, second, third stage.
            prior: What :func:`grid_prior` gives, where it is known already.

        Returns:
            Int64 tensor ``[B, N']``.
        """
        if prior is None:
            prior = grid_prior(pos, stride, canvas)
        keep = self.num_kept(pos.shape[1], canvas, stride)
        reserved = is_multiple(pos, 2 * stride) if self.reserve else None
        return select_tokens(self.score(prior, importance).expand(pos.shape[:2]), keep, reserved)

    def forward(
        self,
        feat: Tensor,
        neighborhood: Neighborhood,
        kept: Tensor,
        importance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Merge neighbourhoods.

        Args:
            feat: Float tensor ``[B, N, C]``.
            neighborhood: Where the tokens lie and what they see.
            kept: Int64 tensor ``[B, N']``, see :meth:`select`.
            importance: Float tensor ``[B, N]``, weight of each token, or ``None`` for 1.

        Returns:
            Positions ``[B, N', 2]`` and features ``[B, N', out_channels]``.
        """
        pos, nearest, cluster_size = neighborhood
        kept_pos = _take(pos, kept)
        linear, norm = cast('tuple[nn.Linear, nn.LayerNorm]', tuple(self.weight_net))
        merged = ops.point_merge(
            feat,
            query_pos=kept_pos,
            key_pos=pos,
            nearest=None if nearest is None else _take(nearest, kept),
            cluster_size=cluster_size,
            weight=linear.weight,
            bias=linear.bias,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            importance=importance,
            max_offset=self.max_offset,
        )
        return kept_pos, self.linear(self.norm(merged))


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, M, C]`` of ``[B, N, C]``."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
