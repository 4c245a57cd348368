"""Encoder, choice of proposals and decoder of BoxeR-3D, on bird's-eye-view maps.

Paper: "BoxeR: Box-Attention for 2D and 3D Transformers" (CVPR 2022, arXiv 2111.13087), section 3.4.  Official code:
kienduynguyen/BoxeR, ``e2edet/module/box3d_transformer.py``.

The layers are those of BoxeR-2D around another attention, ``Box3dAttention``: in the encoder every head looks along its
own anchor angle and predicts no rotation; in the decoder windows carry an angle, which every head and level refines.
Nothing is padded, so there are neither masks nor valid ratios.

Deviations, none of them in value: those of :mod:`boltz_mm.models.layers.box_transformer`.

Held by the golden case ``boxer3d``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmdet.models.layers import inverse_sigmoid
from torch import Tensor

from boltz_mm.models.layers.box_attention import Box3dAttention
from boltz_mm.models.layers.box_position import (
    SpatialShapes,
    reference_windows,
    reference_windows_3d,
    sine_embedding,
)
from boltz_mm.models.layers.box_transformer import (
    MASKED_LOGIT,
    BoxTransformerDecoder,
    BoxTransformerDecoderLayer,
    BoxTransformerEncoder,
    BoxTransformerEncoderLayer,
    Proposals,
)
from boltz_mm.registry import MODELS

# Heads of the encoder: one for each anchor angle.
NUM_ANCHOR_HEADS = 8
# An anchor may become a proposal if its centre lies in the open interval from this to 1 minus this.
_BORDER = 0.001


@MODELS.register_module()
class Box3dTransformerEncoderLayer(BoxTransformerEncoderLayer):
    """Box attention along the heads' anchor angles, then a feed-forward network, each followed by a norm.

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
        num_heads: int = NUM_ANCHOR_HEADS,
        num_levels: int = 2,
        feedforward_channels: int = 1024,
        dropout: float = 0.0,
        grid_size: int = 2,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, num_levels, feedforward_channels, dropout, grid_size, with_cp, init_cfg)
        self.self_attn = Box3dAttention(embed_dims, num_levels, num_heads, with_rotation=False, grid_size=grid_size)


@MODELS.register_module()
class Box3dTransformerDecoderLayer(BoxTransformerDecoderLayer):
    """Self-attention among queries, rotated box attention to the tokens, feed-forward network, each with a norm.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Attention heads.
        num_levels: Levels.
        feedforward_channels: Hidden channels of the feed-forward network.
        dropout: Dropout rate of both attentions' outputs, inside self-attention and inside and after the feed-forward
            network.
        grid_size: Points along each side of a box.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 2,
        feedforward_channels: int = 1024,
        dropout: float = 0.0,
        grid_size: int = 2,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, num_levels, feedforward_channels, dropout, init_cfg=init_cfg)
        self.multihead_attn = Box3dAttention(embed_dims, num_levels, num_heads, with_rotation=True, grid_size=grid_size)


@MODELS.register_module()
class Box3dTransformerEncoder(BoxTransformerEncoder):
    """Encoder layers and the choice of proposals among several anchors of each token.

    Args:
        num_layers: Number of layers.
        layer_cfg: Arguments of :class:`Box3dTransformerEncoderLayer`.
        init_cfg: See :class:`mmengine.model.BaseModule`.

    Raises:
        ValueError: The layers do not have exactly 8 heads, the number of anchor angles.
    """

    layer_class = Box3dTransformerEncoderLayer

    def __init__(self, num_layers: int = 2, layer_cfg: dict | None = None, init_cfg: dict | None = None) -> None:
        num_heads = (layer_cfg or {}).get('num_heads', NUM_ANCHOR_HEADS)
        if num_heads != NUM_ANCHOR_HEADS:
            raise ValueError(
                f'num_heads of the BoxeR-3D encoder must be {NUM_ANCHOR_HEADS}, one for each of its anchor angles, '
                f'got {num_heads}'
            )
        super().__init__(num_layers, layer_cfg, init_cfg)

    @staticmethod
    def reference_windows(spatial_shapes: SpatialShapes, device: torch.device | None = None) -> Tensor:
        """Windows of all tokens and heads, ``[1, S, 8, 5]`` (cx, cy, w, h, angle code)."""
        return reference_windows_3d(spatial_shapes, device=device)

    def position_embedding(self, spatial_shapes: SpatialShapes, device: torch.device | None = None) -> Tensor:
        """Embedding ``[1, S, C]`` of the tokens' centres; unlike in 2D there is no part for the size."""
        # The centres here have the 1e-6 in their denominators that those of the windows do not.
        return sine_embedding(reference_windows(spatial_shapes, device=device)[..., :2], self.embed_dims)

    def select_proposals(
        self,
        memory: Tensor,
        ref_windows: Tensor,
        class_branch: Callable[[Tensor], Tensor],
        box_branch: Callable[[Tensor], Tensor],
        num_queries: int,
    ) -> Proposals:
        """Turn the best rated anchors into queries.

        Args:
            memory: ``[B, S, C]`` output of the encoder.
            ref_windows: ``[B, S, H, 5]`` windows of the tokens (a batch of 1 is broadcast); the first A heads' windows
                are the anchors.
            class_branch: Maps ``[..., C]`` to the rating of each anchor ``[..., A]``.
            box_branch: Maps ``[..., C]`` to box offsets ``[..., A * 7]`` before the sigmoid.
            num_queries: Number of queries ``Q``; fewer are given if there are fewer anchors.

        Returns:
            The queries, and the rating of all anchors for the loss.  ``ref_windows`` is ``[B, Q, 7]`` (cx, cy, w, h,
            angle code, z, height), ``topk_indexes`` counts token * A + anchor, ``class_logits`` is ``[B, S * A, 1]``
            and ``usable`` ``[B, S * A]``.
        """
        batch, _, channels = memory.shape
        class_logits = class_branch(memory)
        anchors = class_logits.shape[-1]
        windows = ref_windows[:, :, :anchors].expand(batch, -1, -1, -1).flatten(1, 2)  # [B, S * A, 5]
        usable = ((windows[..., :2] > _BORDER) & (windows[..., :2] < 1 - _BORDER)).all(dim=-1)
        class_logits = class_logits.flatten(1).masked_fill(~usable, MASKED_LOGIT)

        count = min(num_queries, class_logits.shape[1])
        indexes = class_logits.detach().topk(count, dim=1, sorted=False).indices  # [B, Q]
        tokens = torch.div(indexes, anchors, rounding_mode='floor').unsqueeze(-1)
        chosen = memory.detach().gather(1, tokens.expand(-1, -1, channels))
        with torch.no_grad():
            offsets = box_branch(chosen).unflatten(-1, (anchors, 7))
            offsets = offsets.gather(2, (indexes % anchors)[..., None, None].expand(-1, -1, 1, 7)).squeeze(2)
            references = windows.gather(1, indexes.unsqueeze(-1).expand(-1, -1, 5))
            references = add_windows(references, offsets).sigmoid()
        return Proposals(
            target=self.enc_linear(chosen),
            ref_windows=references,
            query_pos=self.embed_proposals(references),
            topk_indexes=indexes,
            class_logits=class_logits.unsqueeze(-1),
            usable=usable,
        )

    def embed_proposals(self, references: Tensor) -> Tensor:
        """Position embedding ``[B, Q, C]`` of references ``[B, Q, 7]``: of centre, plus size, plus angle code twice."""
        angle = sine_embedding(references[..., 4:5].expand(*references.shape[:-1], 2), self.embed_dims)
        return self.proposal_encoding(references[..., :4]) + angle


@MODELS.register_module()
class Box3dTransformerDecoder(BoxTransformerDecoder):
    """Decoder layers; all look through the same windows ``[B, Q, 7]`` (cx, cy, w, h, angle code, z, height).

    Args:
        num_layers: Number of layers.
        layer_cfg: Arguments of :class:`Box3dTransformerDecoderLayer`.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    layer_class = Box3dTransformerDecoderLayer

    def __init__(self, num_layers: int = 2, layer_cfg: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(num_layers, layer_cfg, init_cfg)


def add_windows(windows: Tensor, offsets: Tensor) -> Tensor:
    """Add windows, as logits, to box offsets.

    Args:
        windows: ``[..., 5]`` in 0..1.
        offsets: ``[..., 7]``; the last two, z and height, have no window.

    Returns:
        ``[..., 7]`` before the sigmoid, float32 at least.
    """
    return offsets + F.pad(inverse_sigmoid(windows, eps=1e-5), (0, 2))
