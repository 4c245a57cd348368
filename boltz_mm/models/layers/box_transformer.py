"""Encoder, choice of proposals and decoder of BoxeR-2D.

Paper: "BoxeR: Box-Attention for 2D and 3D Transformers" (CVPR 2022, arXiv 2111.13087), section 3.3 and appendix.
Official code: kienduynguyen/BoxeR, ``e2edet/module/box_transformer.py``.

Parameters keep the official names (``layers.0.self_attn``, ``multihead_attn``, ``linear1``, ``linear2``, ``norm1``,
``enc_linear``), so official weights load as they are.

Deviations, none of them in value:

1. The decoder never computes the mask features of all queries of all layers.  It hands back, for each layer, a
   :class:`RoIState`, from which :meth:`BoxTransformerDecoder.compute_rois` computes the features of any queries
   afterwards.  The features of a query depend on that query alone and nothing flows back from them, so numbers and
   gradients are those of the official joint computation, for the few queries that a loss or a result needs.
2. The head that rates proposals is an argument of :meth:`BoxTransformerEncoder.select_proposals`, and its logits are
   returned, so that the loss needs no second pass over all tokens.
3. With fewer tokens than queries, all tokens become queries (officially an error).
4. The dropout of the mask features (0 in every official recipe) is drawn apart from that of the box path.

Held by the golden cases ``encoder_layer``, ``encoder_proposals`` and ``decoder_layer_*``.
"""

from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.layers import inverse_sigmoid
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from boltz_mm.models.layers.box_attention import BoxAttention, InstanceAttention, WindowAttention
from boltz_mm.models.layers.box_position import BoxPositionalEncoding, Shapes, shapes_on_device
from boltz_mm.registry import MODELS

# The lowest finite half-precision number: what padded tokens and tokens at the border are rated.
MASKED_LOGIT = -65504.0
# A token may become a proposal if its centre lies in the open interval from this to 1 minus this.
_BORDER = 0.01

RESIDUAL_MODES = ('v1', 'v2')


class Proposals(NamedTuple):
    """What the first stage hands to the decoder and to the loss.

    Attributes:
        target: ``[B, Q, C]`` content of the queries.
        ref_windows: ``[B, Q, 4]`` their windows (cx, cy, w, h) in 0..1, detached.
        query_pos: ``[B, Q, C]`` their position embedding.
        topk_indexes: ``[B, Q]`` the tokens they come from, in no particular order.
        class_logits: ``[B, S, 1]`` rating of every token, :data:`MASKED_LOGIT` where not usable; carries gradients.
        usable: ``[B, S]`` bool, tokens that are neither padded nor at the border.
    """

    target: Tensor
    ref_windows: Tensor
    query_pos: Tensor
    topk_indexes: Tensor
    class_logits: Tensor
    usable: Tensor


class RoIState(NamedTuple):
    """What a decoder layer keeps so that mask features of its queries can be computed afterwards.

    Attributes:
        query: ``[B, Q, C]`` what the cross-attention was asked.
        projected: ``[B, S, H, C / H]`` what it looked at: memory, projected and masked.
        attended: ``[B, Q, C]`` queries after the second norm.
        output: ``[B, Q, C]`` queries after the last norm.
        spatial_shapes: Height and width of each level.
        ref_windows: ``[B, Q, 4]`` windows of the queries.
        valid_ratios: ``[B, L, 2]`` or ``None``.
    """

    query: Tensor
    projected: Tensor
    attended: Tensor
    output: Tensor
    spatial_shapes: Shapes
    ref_windows: Tensor
    valid_ratios: Tensor | None


class DecoderOutput(NamedTuple):
    """What the decoder gives.

    Attributes:
        hidden_states: ``[layers, B, Q, C]`` queries after each layer.
        roi_states: For each layer its :class:`RoIState`, ``None`` where it was not asked for or has no mask features.
    """

    hidden_states: Tensor
    roi_states: tuple[RoIState | None, ...]


class _Layer(BaseModule):
    """The feed-forward part that encoder and decoder layers share."""

    def __init__(self, embed_dims: int, feedforward_channels: int, dropout: float, init_cfg: dict | None) -> None:
        super().__init__(init_cfg)
        self.linear1 = nn.Linear(embed_dims, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, embed_dims)
        self.dropout = nn.Dropout(dropout)

    def _add_feedforward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


def _init_transformer(module: BaseModule) -> None:
    """Xavier-uniform matrices, then the attentions' own initialisation."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, WindowAttention):
            child.reset_parameters()


@MODELS.register_module()
class BoxTransformerEncoderLayer(_Layer):
    """Box attention among all tokens, then a feed-forward network, each followed by a norm.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Attention heads.
        num_levels: Levels.
        feedforward_channels: Hidden channels of the feed-forward network.
        dropout: Dropout rate of the attention output and inside and after the feed-forward network.
        grid_size: Points along each side of a box.
        with_cp: Recompute the layer in the backward pass instead of keeping its activations.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        feedforward_channels: int = 1024,
        dropout: float = 0.0,
        grid_size: int = 2,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(embed_dims, feedforward_channels, dropout, init_cfg)
        self.self_attn = BoxAttention(embed_dims, num_levels, num_heads, grid_size)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.with_cp = with_cp

    def forward(
        self,
        memory: Tensor,
        pos: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            memory: ``[B, S, C]`` tokens of all levels.
            pos: ``[B, S, C]`` their position embedding.
            spatial_shapes: Height and width of each level.
            ref_windows: ``[B, S, 4]`` their windows.
            key_padding_mask: ``[B, S]`` bool, True at padding; ``None`` if nothing is padded.
            valid_ratios: ``[B, L, 2]``; ``None`` if nothing is padded.

        Returns:
            ``[B, S, C]``.
        """
        arguments = (memory, pos, spatial_shapes, ref_windows, key_padding_mask, valid_ratios)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, *arguments, use_reentrant=False)
        return self._forward(*arguments)

    def _forward(
        self,
        memory: Tensor,
        pos: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None,
        valid_ratios: Tensor | None,
    ) -> Tensor:
        attended = self.self_attn(memory + pos, memory, spatial_shapes, ref_windows, key_padding_mask, valid_ratios)
        memory = self.norm1(memory + self.dropout(attended))
        return self.norm2(self._add_feedforward(memory))


@MODELS.register_module()
class BoxTransformerEncoder(BaseModule):
    """Encoder layers and the choice of proposals.

    Args:
        num_layers: Number of layers.
        layer_cfg: Arguments of :class:`BoxTransformerEncoderLayer`.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    layer_class: ClassVar[type[BaseModule]] = BoxTransformerEncoderLayer

    def __init__(self, num_layers: int = 6, layer_cfg: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.layers = ModuleList(self.layer_class(**(layer_cfg or {})) for _ in range(num_layers))
        self.embed_dims = (layer_cfg or {}).get('embed_dims', 256)
        self.enc_linear = nn.Sequential(nn.Linear(self.embed_dims, self.embed_dims), nn.LayerNorm(self.embed_dims))
        self.proposal_encoding = BoxPositionalEncoding(self.embed_dims)

    def init_weights(self) -> None:
        """Xavier-uniform matrices, then the attentions' own initialisation."""
        _init_transformer(self)

    def forward(
        self,
        memory: Tensor,
        pos: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """Run all layers; arguments and result as in :meth:`BoxTransformerEncoderLayer.forward`."""
        pos = pos.to(memory.dtype)
        spatial_shapes = shapes_on_device(spatial_shapes, memory.device)
        for layer in self.layers:
            memory = layer(memory, pos, spatial_shapes, ref_windows, key_padding_mask, valid_ratios)
        return memory

    def select_proposals(
        self,
        memory: Tensor,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None,
        class_branch: Callable[[Tensor], Tensor],
        box_branch: Callable[[Tensor], Tensor],
        num_queries: int,
    ) -> Proposals:
        """Turn the best rated tokens into queries.

        Args:
            memory: ``[B, S, C]`` output of the encoder.
            ref_windows: ``[B, S, 4]`` windows of the tokens (a batch of 1 is broadcast).
            key_padding_mask: ``[B, S]`` bool, True at padding; ``None`` if nothing is padded.
            class_branch: Maps ``[..., C]`` to one rating ``[..., 1]``.
            box_branch: Maps ``[..., C]`` to box offsets ``[..., 4]`` before the sigmoid.
            num_queries: Number of queries ``Q``; fewer are given if there are fewer tokens.

        Returns:
            The queries, and the rating of all tokens for the loss.
        """
        batch, count, channels = memory.shape
        ref_windows = ref_windows.expand(batch, -1, -1)
        centre = ref_windows[..., :2]
        usable = ((centre > _BORDER) & (centre < 1 - _BORDER)).all(dim=-1)  # [B, S]
        if key_padding_mask is not None:
            usable = usable & ~key_padding_mask
        class_logits = class_branch(memory).masked_fill(~usable.unsqueeze(-1), MASKED_LOGIT)

        rating = class_logits.detach().squeeze(-1)
        indexes = rating.topk(min(num_queries, count), dim=1, sorted=False).indices  # [B, Q]
        chosen = memory.detach().gather(1, indexes.unsqueeze(-1).expand(-1, -1, channels))
        with torch.no_grad():
            windows = ref_windows.gather(1, indexes.unsqueeze(-1).expand(-1, -1, 4))
            windows = (box_branch(chosen) + inverse_sigmoid(windows)).sigmoid()
        return Proposals(
            target=self.enc_linear(chosen),
            ref_windows=windows,
            query_pos=self.proposal_encoding(windows),
            topk_indexes=indexes,
            class_logits=class_logits,
            usable=usable,
        )


@MODELS.register_module()
class BoxTransformerDecoderLayer(_Layer):
    """Self-attention among queries, box or instance attention to the tokens, feed-forward network, each with a norm.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Attention heads.
        num_levels: Levels.
        feedforward_channels: Hidden channels of the feed-forward network.
        dropout: Dropout rate of both attentions' outputs, inside self-attention and inside and after the feed-forward
            network.
        with_mask: Use instance attention, so that mask features can be had.
        residual_mode: How mask features are refined after the second norm: 'v1' through the feed-forward network and
            the last norm, 'v2' by adding the layer's output before the last norm.
        grid_size: Points along each side of a box; 2, or 14 ``with_mask``, if not given.
        init_cfg: See :class:`mmengine.model.BaseModule`.

    Raises:
        ValueError: Unknown ``residual_mode``.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        feedforward_channels: int = 1024,
        dropout: float = 0.0,
        with_mask: bool = False,
        residual_mode: str = 'v1',
        grid_size: int | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(embed_dims, feedforward_channels, dropout, init_cfg)
        if residual_mode not in RESIDUAL_MODES:
            raise ValueError(f'residual_mode must be one of {RESIDUAL_MODES}, got {residual_mode!r}')
        self.with_mask = with_mask
        self.residual_mode = residual_mode
        attention, default_grid = (InstanceAttention, 14) if with_mask else (BoxAttention, 2)
        self.self_attn = nn.MultiheadAttention(embed_dims, num_heads, dropout=dropout, batch_first=True)
        self.multihead_attn = attention(embed_dims, num_levels, num_heads, grid_size or default_grid)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.norm3 = nn.LayerNorm(embed_dims)

    def forward(
        self,
        target: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
    ) -> tuple[Tensor, RoIState | None]:
        """Run the layer without mask features.

        Args:
            target: ``[B, Q, C]`` queries.
            query_pos: ``[B, Q, C]`` their position embedding.
            memory: ``[B, S, C]`` tokens of all levels.
            spatial_shapes: Height and width of each level.
            ref_windows: ``[B, Q, 4]`` windows of the queries.
            key_padding_mask: ``[B, S]`` bool, True at padding; ``None`` if nothing is padded.
            valid_ratios: ``[B, L, 2]``; ``None`` if nothing is padded.

        Returns:
            Queries ``[B, Q, C]`` and what :meth:`forward_roi` needs (``None`` without ``with_mask``).
        """
        query = target + query_pos
        attended = self.self_attn(query, query, target, need_weights=False)[0]
        target = self.norm1(target + self.dropout(attended))

        query = target + query_pos
        attention = self.multihead_attn
        projected = attention.project_value(memory, key_padding_mask)
        without_masks = {'mask_output': False} if self.with_mask else {}
        attended = attention.attend(query, projected, spatial_shapes, ref_windows, valid_ratios, **without_masks)
        attended = self.norm2(target + self.dropout(attention.out_proj(attended)))

        output = self.norm3(self._add_feedforward(attended))
        if not self.with_mask:
            return output, None
        return output, RoIState(query, projected, attended, output, spatial_shapes, ref_windows, valid_ratios)

    def forward_roi(self, state: RoIState, rows: Sequence[Tensor]) -> Tensor:
        """Mask features of chosen queries.

        Args:
            state: What :meth:`forward` kept.
            rows: For each image the ``[n_b]`` int64 indexes of its chosen queries, on the device of the state.  Only
                their lengths are read on the host.

        Returns:
            ``[sum of n_b, m, m, C]``, images one after the other, in the order of ``rows``.

        Raises:
            ValueError: ``rows`` is not one tensor for each image.
        """
        batch, queries, _ = state.query.shape
        if len(rows) != batch:
            raise ValueError(f'rows must hold one tensor for each of {batch} images, got {len(rows)}')
        # Sampling wants images apart: pad the rows of each to the longest, and take the padding out again at once.
        padded = pad_sequence(list(rows), batch_first=True)  # [B, N]
        ref_windows = state.ref_windows.expand(batch, -1, -1)
        _, mask_features = self.multihead_attn.attend(
            _gather_rows(state.query, padded),
            state.projected,
            state.spatial_shapes,
            _gather_rows(ref_windows, padded),
            state.valid_ratios,
        )
        features = torch.cat([image[: len(row)] for image, row in zip(mask_features, rows, strict=True)])
        features = self.multihead_attn.out_proj(features)  # [N, m, m, C]

        chosen = torch.cat([row + image * queries for image, row in enumerate(rows)])
        attended = state.attended.flatten(0, 1).index_select(0, chosen)[:, None, None]
        roi = self.norm2(attended + self.dropout(features))
        if self.residual_mode == 'v1':
            return self.norm3(self._add_feedforward(roi))
        output = state.output.flatten(0, 1).index_select(0, chosen)[:, None, None]
        return self.norm3(output + roi)


def _gather_rows(tensor: Tensor, indexes: Tensor) -> Tensor:
    """Rows ``indexes`` ``[B, N]`` of ``tensor`` ``[B, Q, C]``: ``[B, N, C]``."""
    return tensor.gather(1, indexes.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))


@MODELS.register_module()
class BoxTransformerDecoder(BaseModule):
    """Decoder layers.  All look through the same windows; there is no refinement from layer to layer.

    Args:
        num_layers: Number of layers.
        layer_cfg: Arguments of :class:`BoxTransformerDecoderLayer`.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    layer_class: ClassVar[type[BaseModule]] = BoxTransformerDecoderLayer

    def __init__(self, num_layers: int = 6, layer_cfg: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.layers = ModuleList(self.layer_class(**(layer_cfg or {})) for _ in range(num_layers))

    def init_weights(self) -> None:
        """Xavier-uniform matrices, then the attentions' own initialisation."""
        _init_transformer(self)

    def forward(
        self,
        target: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        roi_layers: Collection[int] | None = None,
    ) -> DecoderOutput:
        """Run all layers; arguments but the last as in :meth:`BoxTransformerDecoderLayer.forward`.

        Args:
            target: ``[B, Q, C]``.
            query_pos: ``[B, Q, C]``.
            memory: ``[B, S, C]``.
            spatial_shapes: Height and width of each level.
            ref_windows: ``[B, Q, 4]``.
            key_padding_mask: ``[B, S]`` bool or ``None``.
            valid_ratios: ``[B, L, 2]`` or ``None``.
            roi_layers: Layers whose mask features will be asked for (each keeps its projected memory alive); all if
                not given.

        Returns:
            Queries after each layer, and what :meth:`compute_rois` needs.
        """
        query_pos = query_pos.to(target.dtype)
        spatial_shapes = shapes_on_device(spatial_shapes, memory.device)
        hidden_states, roi_states = [], []
        for index, layer in enumerate(self.layers):
            target, state = layer(
                target, query_pos, memory, spatial_shapes, ref_windows, key_padding_mask, valid_ratios
            )
            hidden_states.append(target)
            roi_states.append(state if roi_layers is None or index in roi_layers else None)
        return DecoderOutput(torch.stack(hidden_states), tuple(roi_states))

    def compute_rois(self, layer_index: int, state: RoIState, rows: Sequence[Tensor]) -> Tensor:
        """Mask features of chosen queries of one layer.

        Args:
            layer_index: The layer that ``state`` comes from.
            state: ``roi_states[layer_index]`` of :meth:`forward`.
            rows: For each image the ``[n_b]`` int64 indexes of its chosen queries.

        Returns:
            ``[sum of n_b, m, m, C]``, images one after the other, in the order of ``rows``.
        """
        return self.layers[layer_index].forward_roi(state, rows)
