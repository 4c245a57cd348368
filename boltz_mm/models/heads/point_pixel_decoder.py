"""The pixel decoder of Mask2Former on token sets.

Paper: "AutoFocusFormer: Image Segmentation off the Grid" (CVPR 2023, arXiv 2304.12406).  Official code:
apple/ml-autofocusformer-segmentation, ``pixel_decoder/msdeformattn_pc.py`` (``MSDeformAttnPixelDecoder``).  mmdet's
``MSDeformAttnPixelDecoder`` cannot serve: it works on grid maps with convolutions.

Deviations, none in value: the finest level is put into row-major order once, so that its neighbours follow from the
canvas; neighbour tables are made once and serve the encoder and the upsampling.

Parameter names are the official ones.  Held by the golden cases ``pixel_decoder_*``.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from mmengine.model import caffe2_xavier_init
from torch import Tensor, nn

from boltz_mm.models.layers.point_conv import PointConv
from boltz_mm.models.layers.point_deform_attention import PointDeformEncoder, PointLevels
from boltz_mm.models.layers.point_position import PointSineEncoding
from boltz_mm.models.layers.point_tables import (
    Canvas,
    canvas_positions,
    grid_neighbors,
    nearest_tables,
    token_of_cell,
)
from boltz_mm.ops import inverse_distance_interpolate
from boltz_mm.registry import MODELS
from boltz_mm.structures import PointFeature

# Exponent of the squared distance in the upsampling; the official code fixes it.
_UPSAMPLING_POWER = 3.0


class PixelDecoderOutput(NamedTuple):
    """What the transformer decoder needs.

    Attributes:
        mask_features: Features of every cell in row-major order, ``[B, h * w, M]``.
        memory: Tokens of each encoded level, coarsest first.
        canvas: Height and width (h, w).
    """

    mask_features: Tensor
    memory: list[PointFeature]
    canvas: Canvas


class PointDeformTransformer(nn.Module):
    """The encoder with its level embedding.

    Args:
        embed_dims: Channels ``d``.
        num_levels: Levels.
        **encoder: Arguments of :class:`PointDeformEncoder`.
    """

    def __init__(self, embed_dims: int, num_levels: int, **encoder) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dims))
        self.encoder = PointDeformEncoder(embed_dims=embed_dims, num_levels=num_levels, **encoder)

    def forward(self, x: Tensor, pos_embed: Tensor, levels: PointLevels) -> Tensor:
        """Encode the tokens ``x`` of all levels, whose positions are embedded as ``pos_embed`` (both ``[B, S, d]``)."""
        embeds = [embed.expand(size, -1) for embed, size in zip(self.level_embed, levels.sizes, strict=True)]
        return self.encoder(x, pos_embed + torch.cat(embeds), levels)


@MODELS.register_module()
class PointPixelDecoder(nn.Module):
    """Exchange features between levels, then bring them to the finest level.

    All but the finest level pass a deformable encoder; the finest encoded level is interpolated at every cell of the
    stride-4 grid, added to the finest level and mixed by one :class:`PointConv`.

    Runs in float32 under autocast, as the official code does, unless ``autocast`` is set.

    Args:
        in_channels: Channels of each level, finest first.
        feat_channels: Channels ``d`` of the encoder.
        out_channels: Channels ``M`` of the mask features.
        num_heads: Heads of the deformable attention.
        num_points: Places per head and level.
        num_layers: Layers of the encoder.
        feedforward_channels: Width of the hidden layer of its feed-forward part.
        power: Exponent of the squared distance in the attention's interpolation (start value where learned).
        learnable_power: Learn it, in each layer.
        dropout: Rate inside the encoder.
        per_image: See :class:`PointSineEncoding`.
        autocast: Follow an autocast of the caller instead of leaving it.

    Raises:
        ValueError: Fewer than 2 levels, or ``feat_channels`` is no multiple of 4.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        feat_channels: int = 256,
        out_channels: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        num_layers: int = 6,
        feedforward_channels: int = 1024,
        power: float = 3.0,
        learnable_power: bool = True,
        dropout: float = 0.0,
        per_image: bool = False,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        if len(in_channels) < 2:
            raise ValueError(f'at least 2 levels are needed, got in_channels={list(in_channels)}')
        if feat_channels % 4:
            raise ValueError(f'feat_channels must be a multiple of 4, got {feat_channels}')
        self.autocast = autocast
        finest, *coarser = in_channels
        self.position = PointSineEncoding(feat_channels // 2, per_image=per_image)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, feat_channels), nn.LayerNorm(feat_channels))
            for channels in reversed(coarser)
        )
        self.transformer = PointDeformTransformer(
            feat_channels,
            len(coarser),
            num_layers=num_layers,
            num_heads=num_heads,
            num_points=num_points,
            feedforward_channels=feedforward_channels,
            power=power,
            learnable_power=learnable_power,
            dropout=dropout,
        )
        self.adapter_1 = nn.Sequential(nn.Linear(finest, feat_channels), nn.LayerNorm(feat_channels))
        self.layer_1 = nn.Sequential(PointConv(feat_channels, feat_channels), nn.LayerNorm(feat_channels), nn.ReLU())
        self.mask_features = nn.Linear(feat_channels, out_channels)
        for project, _ in self.input_proj:
            nn.init.xavier_uniform_(project.weight)
            nn.init.zeros_(project.bias)
        for linear in (self.adapter_1[0], self.mask_features):
            caffe2_xavier_init(linear)

    def forward(self, x: Sequence[PointFeature]) -> PixelDecoderOutput:
        """Decode.

        Args:
            x: Levels, finest first.  The finest one has a token on every cell of its canvas ``shape`` (in any order),
                the others have any number of tokens on it.  Fewer than 4 repeat each other as neighbours, see
                :func:`nearest_tables`.

        Returns:
            See :class:`PixelDecoderOutput`.

        Raises:
            ValueError: The number of levels is not that of ``in_channels``, a level has no tokens, or the finest level
                does not fill its canvas.
        """
        if len(x) != len(self.input_proj) + 1:
            raise ValueError(f'expected {len(self.input_proj) + 1} levels, got {len(x)}')
        with nullcontext() if self.autocast else torch.autocast(x[0].feat.device.type, enabled=False):
            return self._decode(x)

    def _decode(self, x: Sequence[PointFeature]) -> PixelDecoderOutput:
        if not self.autocast:
            x = [level._replace(feat=level.feat.to(self.level_dtype)) for level in x]
        finest, coarser = x[0], x[:0:-1]
        canvas = finest.shape
        tokens = token_of_cell(finest.pos, canvas)

        positions = [level.pos for level in coarser]
        levels = PointLevels(
            torch.cat(positions, dim=1), [p.shape[1] for p in positions], nearest_tables(positions, canvas), canvas
        )
        feats = torch.cat([project(level.feat) for project, level in zip(self.input_proj, coarser, strict=True)], dim=1)
        pos_embed = torch.cat([self.position(pos) for pos in positions], dim=1).to(feats)
        encoded = self.transformer(feats, pos_embed, levels).split(levels.sizes, dim=1)

        grid = canvas_positions(canvas, finest.pos.device).to(finest.pos.dtype).expand(len(tokens), -1, -1)
        raised = inverse_distance_interpolate(encoded[-1], positions[-1], grid, levels.tables[:, -1], _UPSAMPLING_POWER)
        lateral = self.adapter_1(finest.feat.gather(1, tokens[..., None].expand_as(finest.feat)))
        conv, norm, act = self.layer_1
        mixed = act(norm(conv(lateral + raised, grid, grid_neighbors(tokens, canvas))))
        memory = [PointFeature(feat, pos, canvas) for feat, pos in zip(encoded, positions, strict=True)]
        return PixelDecoderOutput(self.mask_features(mixed), memory, canvas)

    @property
    def level_dtype(self) -> torch.dtype:
        """Type that the levels are brought to: that of the weights."""
        return self.mask_features.weight.dtype
