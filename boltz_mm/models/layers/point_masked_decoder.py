"""The masked transformer decoder of Mask2Former on token sets.

Papers: "Masked-attention Mask Transformer for Universal Image Segmentation" (CVPR 2022, arXiv 2112.01527),
"AutoFocusFormer: Image Segmentation off the Grid" (CVPR 2023, arXiv 2304.12406).  Official code:
apple/ml-autofocusformer-segmentation, ``transformer_decoder/mask2former_transformer_decoder.py``
(``MultiScaleMaskedTransformerDecoder``).  mmdet's ``Mask2FormerTransformerDecoder`` has equal layers, but its head
works on 4-D maps.

Deviations, none in value: the mask logits that block attention are read at the cell of each token, where the official
code interpolates them from four neighbours of which one has all the weight; where nothing else is asked for, they are
computed at these cells only.

Parameter names are the official ones.  Held by the golden cases ``decoder_*``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import caffe2_xavier_init
from torch import Tensor, nn

from boltz_mm.models.layers.point_position import PointSineEncoding
from boltz_mm.models.layers.point_tables import Canvas, cell_index
from boltz_mm.registry import MODELS
from boltz_mm.structures import PointFeature


class MaskableAttention(nn.Module):
    """Multi-head attention with the parameters of ``torch.nn.MultiheadAttention`` and a boolean mask for all heads.

    ``torch.nn.MultiheadAttention`` would make a float mask for each head.

    Args:
        embed_dims: Channels ``d``.
        num_heads: Heads; has to divide ``embed_dims``.

    Raises:
        ValueError: ``embed_dims`` is no multiple of ``num_heads``.
    """

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims must be a multiple of num_heads, got {embed_dims} and {num_heads}')
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dims, embed_dims))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dims))
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Q, d]``.
            key: ``[B, N, d]``.
            value: ``[B, N, d]``.
            allowed: Keys that each query may see, bool ``[B, Q, N]``; ``None``: all.

        Returns:
            ``[B, Q, d]``.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if allowed is None else allowed.unsqueeze(1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    """Attention of queries to tokens, a residual and a norm."""

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = MaskableAttention(embed_dims, num_heads)
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """Update the queries ``[B, Q, d]`` from tokens ``[B, N, d]``, each from those it may see ``[B, Q, N]``."""
        return self.norm(x + self.multihead_attn(x + query_pos, key, value, allowed))


class SelfAttentionLayer(nn.Module):
    """Attention among queries, a residual and a norm."""

    def __init__(self, embed_dims: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = MaskableAttention(embed_dims, num_heads)
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor, query_pos: Tensor) -> Tensor:
        """Update the queries ``[B, Q, d]``."""
        query = x + query_pos
        return self.norm(x + self.self_attn(query, query, x))


class FeedForwardLayer(nn.Module):
    """Two linear layers, a residual and a norm."""

    def __init__(self, embed_dims: int, feedforward_channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dims, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, embed_dims)
        self.norm = nn.LayerNorm(embed_dims)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Update the queries ``[B, Q, d]``."""
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MaskEmbedding(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, embed_dims: int, out_channels: int) -> None:
        super().__init__()
        widths = [embed_dims] * 3 + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Mask embeddings ``[B, Q, M]`` of queries ``[B, Q, d]``."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def allowed_tokens(mask_logits: Tensor) -> Tensor:
    """Tokens that each query may see: those inside its mask, or all where its mask is empty.

    Args:
        mask_logits: Logits of each query at each token ``[B, Q, N]``.

    Returns:
        bool ``[B, Q, N]``.
    """
    # The sigmoid decides, not the sign: it rounds to 0.5 for tiny negative logits.
    blocked = mask_logits.sigmoid() < 0.5
    return ~blocked | blocked.all(dim=-1, keepdim=True)


@MODELS.register_module()
class PointMaskedDecoder(nn.Module):
    """Queries that look at the tokens inside their own masks, level by level.

    Args:
        num_classes: Classes ``K`` without the one for "no object".
        in_channels: Channels of the memory.
        embed_dims: Channels ``d`` of the queries.
        out_channels: Channels ``M`` of the mask features.
        num_queries: Queries ``Q``.
        num_layers: Layers; there is one prediction before the first and one after each.
        num_heads: Heads of all attentions.
        feedforward_channels: Width of the hidden layer of the feed-forward part.
        num_levels: Levels of the memory; layer i looks at level ``i % num_levels``.
        enforce_input_project: Project the memory even where ``in_channels`` equals ``embed_dims``.
        per_image: See :class:`PointSineEncoding`.

    Raises:
        ValueError: ``embed_dims`` is no multiple of 4.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 256,
        embed_dims: int = 256,
        out_channels: int = 256,
        num_queries: int = 100,
        num_layers: int = 9,
        num_heads: int = 8,
        feedforward_channels: int = 2048,
        num_levels: int = 3,
        enforce_input_project: bool = False,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        if embed_dims % 4:
            raise ValueError(f'embed_dims must be a multiple of 4, got {embed_dims}')
        self.position = PointSineEncoding(embed_dims // 2, per_image=per_image)
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(embed_dims, num_heads) for _ in range(num_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(embed_dims, num_heads) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(embed_dims, feedforward_channels) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(embed_dims)
        self.query_feat = nn.Embedding(num_queries, embed_dims)
        self.query_embed = nn.Embedding(num_queries, embed_dims)
        self.level_embed = nn.Embedding(num_levels, embed_dims)
        self.input_proj = nn.ModuleList()
        for _ in range(num_levels):
            if in_channels == embed_dims and not enforce_input_project:
                self.input_proj.append(nn.Identity())
            else:
                self.input_proj.append(nn.Linear(in_channels, embed_dims))
                caffe2_xavier_init(self.input_proj[-1])
        self.class_embed = nn.Linear(embed_dims, num_classes + 1)
        self.mask_embed = MaskEmbedding(embed_dims, out_channels)

    def forward(
        self, memory: Sequence[PointFeature], mask_features: Tensor, canvas: Canvas, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Predict classes and masks.

        Args:
            memory: Tokens of each level, coarsest first.
            mask_features: Features of every cell of the canvas in row-major order, ``[B, h * w, M]``.
            canvas: Height and width.
            last_only: Make the last prediction only, and of the others no more than the next layer needs.

        Returns:
            Class logits ``[B, Q, K + 1]`` and mask logits ``[B, Q, h, w]``, one of each per prediction in order (with
            ``last_only`` the last one).
        """
        sources = [
            project(level.feat) + embed
            for project, level, embed in zip(self.input_proj, memory, self.level_embed.weight, strict=True)
        ]
        keys = [source + self.position(level.pos).to(source) for source, level in zip(sources, memory, strict=True)]
        cells = [cell_index(level.pos, canvas) for level in memory]
        maps = mask_features.transpose(1, 2)
        # What the attention masks are made from: all of it is at hand anyway, or just these cells.
        parts = [maps.gather(2, c[:, None].expand(-1, maps.shape[1], -1)) for c in cells] if last_only else []

        batch = len(mask_features)
        query_pos = self.query_embed.weight.expand(batch, -1, -1)
        x = self.query_feat.weight.expand(batch, -1, -1)
        all_classes, all_masks = [], []
        for i, (cross, own, feedforward) in enumerate(
            zip(
                self.transformer_cross_attention_layers,
                self.transformer_self_attention_layers,
                self.transformer_ffn_layers,
                strict=True,
            )
        ):
            level = i % len(memory)
            if last_only:
                with torch.no_grad():
                    at_tokens = self.mask_embed(self.decoder_norm(x)) @ parts[level]
            else:
                classes, masks = self.predict(x, maps)
                all_classes.append(classes)
                all_masks.append(masks.unflatten(-1, canvas))
                at_tokens = masks.detach().gather(2, cells[level][:, None].expand(-1, masks.shape[1], -1))
            x = cross(x, query_pos, keys[level], sources[level], allowed_tokens(at_tokens))
            x = feedforward(own(x, query_pos))
        classes, masks = self.predict(x, maps)
        return [*all_classes, classes], [*all_masks, masks.unflatten(-1, canvas)]

    def predict(self, x: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits ``[B, Q, K + 1]`` and mask logits ``[B, Q, h * w]`` of queries ``[B, Q, d]``."""
        x = self.decoder_norm(x)
        return self.class_embed(x), self.mask_embed(x) @ maps
