"""Deformable attention between token sets off the grid, and the encoder made of it.

Paper: "AutoFocusFormer: Image Segmentation off the Grid" (CVPR 2023, arXiv 2304.12406).  Official code:
apple/ml-autofocusformer-segmentation, ``pixel_decoder/msdeformattn_pc.py`` (``MSDeformAttnPc``, the encoder and its
layers).  mmcv's ``MultiScaleDeformableAttention`` samples grids at normalised points and cannot serve here.

All levels are handed around as one tensor (coarsest level first), because every level is treated with the same weights
and sees all levels; the official code loops over a list.  Parameter names are the official ones.

Deviations: none in value.

Held by the golden cases ``msdeform_attn_*`` and ``pixel_decoder_*``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boltz_mm.models.layers.point_tables import Canvas
from boltz_mm.ops import point_deform_attention


class PointLevels(NamedTuple):
    """Where the tokens of all levels stand.

    Attributes:
        pos: Positions (x, y) of all tokens, coarsest level first, ``[B, S, 2]``.
        sizes: Tokens of each level; their sum is S.
        tables: The 4 nearest tokens of each cell within each level, ``[B, L, h * w, 4]``.
        canvas: Height and width of the canvas of the positions.
    """

    pos: Tensor
    sizes: list[int]
    tables: Tensor
    canvas: Canvas


class PointDeformAttention(nn.Module):
    """Attention to a few learned places of every level, each read off its four nearest tokens.

    A place is the query's position plus a learned offset in cells.  The four tokens are those nearest to the cell that
    the place rounds to; they are weighted by ``1 / (d^(2 power) + 1e-11)`` of their distance d to the place itself.

    Args:
        embed_dims: Channels ``d`` of queries and values.
        num_levels: Levels ``L``.
        num_heads: Heads ``H``; has to divide ``embed_dims``.
        num_points: Places per head and level ``P``.
        power: Exponent of the squared distance (start value where learned).
        learnable_power: Learn the exponent.

    Raises:
        ValueError: ``embed_dims`` is no multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_levels: int = 3,
        num_heads: int = 8,
        num_points: int = 4,
        power: float = 3.0,
        learnable_power: bool = True,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims must be a multiple of num_heads, got {embed_dims} and {num_heads}')
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.shepard_power = nn.Parameter(torch.full((1,), float(power))) if learnable_power else float(power)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from places on a star around the query, equal weights, Xavier projections."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        star = torch.stack((angles.cos(), angles.sin()), dim=-1)
        star = star / star.abs().amax(dim=-1, keepdim=True)
        reach = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        places = star[:, None, None] * reach[:, None]  # [H, 1, P, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(places.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, value: Tensor, levels: PointLevels) -> Tensor:
        """Attend from every token to the tokens of all levels.

        Args:
            query: Features with position and level embedding, ``[B, S, d]``.
            value: Features, ``[B, S, d]``.
            levels: Where the tokens stand; queries and values share it.

        Returns:
            ``[B, S, d]``.
        """
        shape = (self.num_heads, self.num_levels, self.num_points)
        attended = point_deform_attention(
            self.value_proj(value).unflatten(-1, (self.num_heads, -1)),
            levels.pos,
            levels.sizes,
            levels.tables,
            levels.canvas,
            levels.pos,
            self.sampling_offsets(query).unflatten(-1, (*shape, 2)),
            self.attention_weights(query).unflatten(-1, shape),
            self.shepard_power,
        )
        return self.output_proj(attended)


class PointDeformEncoderLayer(nn.Module):
    """Deformable attention and feed-forward, each with a residual and a norm behind it.

    Args:
        embed_dims: Channels ``d``.
        feedforward_channels: Width of the hidden layer.
        dropout: Rate of both residual branches and of the hidden layer.
        **attention: Further arguments of :class:`PointDeformAttention`.
    """

    def __init__(
        self, embed_dims: int = 256, feedforward_channels: int = 1024, dropout: float = 0.0, **attention
    ) -> None:
        super().__init__()
        self.self_attn = PointDeformAttention(embed_dims, **attention)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.linear1 = nn.Linear(embed_dims, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, query_pos: Tensor, levels: PointLevels) -> Tensor:
        """Update the tokens.

        Args:
            x: Features of all levels ``[B, S, d]``.
            query_pos: Position plus level embedding ``[B, S, d]``.
            levels: Where the tokens stand.

        Returns:
            ``[B, S, d]``.
        """
        x = self.norm1(x + self.dropout(self.self_attn(x + query_pos, x, levels)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class PointDeformEncoder(nn.Module):
    """A stack of :class:`PointDeformEncoderLayer`.

    Args:
        num_layers: How many.
        **layer: Arguments of each layer.
    """

    def __init__(self, num_layers: int = 6, **layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PointDeformEncoderLayer(**layer) for _ in range(num_layers))

    def forward(self, x: Tensor, query_pos: Tensor, levels: PointLevels) -> Tensor:
        """As :meth:`PointDeformEncoderLayer.forward`, layer after layer."""
        for layer in self.layers:
            x = layer(x, query_pos, levels)
        return x
