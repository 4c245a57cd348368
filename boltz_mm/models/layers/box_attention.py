"""Box, instance and rotated-box attention: the modules around :func:`boltz_mm.ops.box_attention`.

Paper: "BoxeR: Box-Attention for 2D and 3D Transformers" (CVPR 2022, arXiv 2111.13087), sections 3.1, 3.2 and 4.
Official code: kienduynguyen/BoxeR, ``e2edet/module/box_attention.py``.

A query carries a reference window.  For each head and level a linear layer predicts how to move and scale the window,
another one the weights of an m x m grid of points laid over the result; the sampled, weighted values are summed.
Parameters and the buffer ``kernel_indices`` have the official names and shapes, so official weights load as they are.

Deviations, none of them in value: sampling locations and per-point weights are never materialised (the operators take
boxes and logits); whether instance attention computes its mask features is an argument, not a state of the module; the
projected values can be kept and asked again for a few queries.  Boxes and logits are float32 at least, also under
autocast.

Held by the golden cases ``box_attention_*``, ``instance_attention_*`` and ``box3d_attention_*``.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.models.layers.box_position import Shapes
from boltz_mm.registry import MODELS
from boltz_mm.utils.dtypes import at_least_float32

# Predicted offsets are in eighths of the window; angle offsets in sixteenths of a turn.
_OFFSET_SCALE = 8
_ANGLE_SCALE = 16


class WindowAttention(BaseModule):
    """What the three attentions share: value projection, box and weight prediction, initialisation.

    Args:
        embed_dims: Channels ``C``.
        num_levels: Levels ``L``.
        num_heads: Heads ``H``, a divisor of ``C``.
        grid_size: Points ``m`` along each side of a box.
        box_params: Numbers predicted for each head and level.
        weights_per_box: Weight logits predicted for each head and level.
        grid_scale: Divisor of the grid offsets; ``m`` if not given.
        init_cfg: See :class:`mmengine.model.BaseModule`.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dims``.
    """

    kernel_indices: Tensor

    def __init__(
        self,
        embed_dims: int,
        num_levels: int,
        num_heads: int,
        grid_size: int,
        *,
        box_params: int,
        weights_per_box: int,
        grid_scale: float | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims must be a multiple of num_heads, got {embed_dims} and {num_heads}')
        self.embed_dims = embed_dims
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.box_params = box_params
        boxes = num_heads * num_levels
        self.linear_box_weight = nn.Parameter(torch.empty(boxes * box_params, embed_dims))
        self.linear_box_bias = nn.Parameter(torch.empty(boxes * box_params))
        self.linear_attn_weight = nn.Parameter(torch.empty(boxes * weights_per_box, embed_dims))
        self.linear_attn_bias = nn.Parameter(torch.empty(boxes * weights_per_box))
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        self.register_buffer('kernel_indices', ops.grid_points(grid_size, scale=grid_scale))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with uniform attention over boxes that differ by head and level (box bias uniform in [0, 1))."""
        for linear in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for parameter in (self.linear_attn_weight, self.linear_attn_bias, self.linear_box_weight):
            nn.init.zeros_(parameter)
        nn.init.uniform_(self.linear_box_bias)

    def init_weights(self) -> None:
        """Initialise as in :meth:`reset_parameters`, then as ``init_cfg`` says."""
        self.reset_parameters()
        super().init_weights()

    def project_value(self, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Project tokens and set padded ones to 0, after the projection so that its bias is removed too.

        Args:
            value: ``[B, S, C]``.
            key_padding_mask: ``[B, S]`` bool, True at padding.

        Returns:
            ``[B, S, H, C / H]``.
        """
        projected = self.value_proj(value)
        if key_padding_mask is not None:
            projected = projected.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        return projected.unflatten(-1, (self.num_heads, -1))

    def _predict_offsets(self, query: Tensor) -> Tensor:
        """``[B, Q, C]`` to ``[B, Q, H, L, box_params]``, float32 at least."""
        offsets = F.linear(query, self.linear_box_weight, self.linear_box_bias)
        return at_least_float32(offsets).unflatten(-1, (self.num_heads, self.num_levels, self.box_params))

    def predict_boxes(self, query: Tensor, ref_windows: Tensor) -> Tensor:
        """Move and scale the reference windows.

        Args:
            query: ``[B, Q, C]``, position added.
            ref_windows: ``[B, Q, 4]`` or, one for each head, ``[B, Q, H, 4]`` as (cx, cy, w, h) in 0..1.

        Returns:
            ``[B, Q, H, L, 4]``; sizes may be negative (the operator takes them as 0).
        """
        return _move_windows(_per_head(ref_windows), self._predict_offsets(query))

    def predict_logits(self, query: Tensor) -> Tensor:
        """Weight logits of the points: ``[B, Q, C]`` to ``[B, Q, H, L, weights_per_box]``, float32 at least."""
        logits = F.linear(query, self.linear_attn_weight, self.linear_attn_bias)
        return at_least_float32(logits).unflatten(-1, (self.num_heads, self.num_levels, -1))

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Q, C]``, position added.
            value: ``[B, S, C]``, tokens of all levels.
            spatial_shapes: Height and width of each level.
            ref_windows: ``[B, Q, 4]`` or, one for each head, ``[B, Q, H, 4]`` as (cx, cy, w, h) in 0..1 of the
                unpadded image; with an angle code in :class:`Box3dAttention`.
            key_padding_mask: ``[B, S]`` bool, True at padding; ``None`` if nothing is padded.
            valid_ratios: ``[B, L, 2]`` part of each level that is not padding, (x, y); ``None`` if nothing is padded.

        Returns:
            ``[B, Q, C]``.

        Raises:
            ValueError: The number of levels is not the one this module was built for.
        """
        self._check_levels(spatial_shapes)
        projected = self.project_value(value, key_padding_mask)
        return self.out_proj(self.attend(query, projected, spatial_shapes, ref_windows, valid_ratios))

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        projected: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        valid_ratios: Tensor | None = None,
    ) -> Any:
        """:meth:`forward` between the two projections: ``projected`` is what :meth:`project_value` gave."""

    def _check_levels(self, spatial_shapes: Shapes) -> None:
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(f'built for {self.num_levels} levels, got spatial_shapes {spatial_shapes}')


def _per_head(ref_windows: Tensor) -> Tensor:
    """``[B, Q, n]`` or ``[B, Q, H, n]`` to something that broadcasts with ``[B, Q, H, L, n]``."""
    if ref_windows.dim() == 3:
        ref_windows = ref_windows.unsqueeze(2)
    return ref_windows.unsqueeze(3)


def _move_windows(windows: Tensor, offsets: Tensor) -> Tensor:
    """Add offsets (x, y, w, h), in eighths of the windows' sizes, to windows (cx, cy, w, h)."""
    size = windows[..., 2:].tile(2)  # (w, h, w, h)
    return windows + offsets / _OFFSET_SCALE * size


@MODELS.register_module()
class BoxAttention(WindowAttention):
    """Attention to an m x m grid in a box that each head and level predicts from the query's window.

    Args:
        embed_dims: Channels ``C``.
        num_levels: Levels ``L``.
        num_heads: Heads ``H``, a divisor of ``C``.
        grid_size: Points ``m`` along each side of a box.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        grid_size: int = 2,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            embed_dims,
            num_levels,
            num_heads,
            grid_size,
            box_params=4,
            weights_per_box=grid_size**2,
            init_cfg=init_cfg,
        )

    def attend(
        self,
        query: Tensor,
        projected: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` between the two projections: ``projected`` is what :meth:`project_value` gave."""
        return ops.box_attention(
            projected,
            spatial_shapes,
            self.predict_boxes(query, ref_windows),
            self.predict_logits(query),
            self.kernel_indices,
            valid_ratios=valid_ratios,
        )


@MODELS.register_module()
class InstanceAttention(WindowAttention):
    """Box attention that can also give the grid of features it looked at: one vector per point, for masks.

    The query predicts 2 x 2 logits for each head and level, each standing for a quadrant of the grid.  Their softmax
    over levels and points weighs the sum that is the output; their softmax over the levels alone weighs, point by
    point, the mask features.

    Args:
        embed_dims: Channels ``C``.
        num_levels: Levels ``L``.
        num_heads: Heads ``H``, a divisor of ``C``.
        grid_size: Points ``m`` along each side of a box, even.
        init_cfg: See :class:`mmengine.model.BaseModule`.

    Raises:
        ValueError: ``grid_size`` is odd.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        grid_size: int = 14,
        init_cfg: dict | None = None,
    ) -> None:
        if grid_size % 2:
            raise ValueError(f'grid_size must be even, got {grid_size}')
        super().__init__(
            embed_dims, num_levels, num_heads, grid_size, box_params=4, weights_per_box=4, init_cfg=init_cfg
        )

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        key_padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        mask_output: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: ``[B, Q, C]``, position added.
            value: ``[B, S, C]``, tokens of all levels.
            spatial_shapes: As in :meth:`BoxAttention.forward`, like the three that follow.
            ref_windows: ``[B, Q, 4]`` or ``[B, Q, H, 4]``.
            key_padding_mask: ``[B, S]`` bool or ``None``.
            valid_ratios: ``[B, L, 2]`` or ``None``.
            mask_output: Whether to compute the mask features.

        Returns:
            ``[B, Q, C]`` and, with ``mask_output``, the mask features ``[B, Q, m, m, C]``.

        Raises:
            ValueError: The number of levels is not the one this module was built for.
        """
        self._check_levels(spatial_shapes)
        projected = self.project_value(value, key_padding_mask)
        result = self.attend(query, projected, spatial_shapes, ref_windows, valid_ratios, mask_output)
        if not mask_output:
            return self.out_proj(result)
        output, mask_features = result
        return self.out_proj(output), self.out_proj(mask_features)

    def attend(
        self,
        query: Tensor,
        projected: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        valid_ratios: Tensor | None = None,
        mask_output: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """:meth:`forward` between the two projections: ``projected`` is what :meth:`project_value` gave."""
        return ops.instance_attention(
            projected,
            spatial_shapes,
            self.predict_boxes(query, ref_windows),
            self.predict_logits(query).unflatten(-1, (2, 2)),
            self.kernel_indices,
            valid_ratios=valid_ratios,
            mask_output=mask_output,
        )


@MODELS.register_module()
class Box3dAttention(WindowAttention):
    """Box attention in a bird's-eye view, where boxes are rotated about their centre.

    Two official oddities that trained weights rely on are kept: grid offsets are divided by 2, not by the grid size,
    and without predicted rotation the angle code of the window (0..1, which stands for a full turn) is taken as
    radians.

    Reference windows are ``[B, Q, n]`` or, one for each head, ``[B, Q, H, n]`` with n >= 5: (cx, cy, w, h, angle code)
    in 0..1; more is ignored.

    Args:
        embed_dims: Channels ``C``.
        num_levels: Levels ``L``.
        num_heads: Heads ``H``, a divisor of ``C``.
        with_rotation: Predict a rotation of the window too.
        grid_size: Points ``m`` along each side of a box.
        init_cfg: See :class:`mmengine.model.BaseModule`.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_levels: int = 2,
        num_heads: int = 8,
        with_rotation: bool = True,
        grid_size: int = 2,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            embed_dims,
            num_levels,
            num_heads,
            grid_size,
            box_params=5 if with_rotation else 4,
            weights_per_box=grid_size**2,
            grid_scale=2,
            init_cfg=init_cfg,
        )
        self.with_rotation = with_rotation

    def attend(
        self,
        query: Tensor,
        projected: Tensor,
        spatial_shapes: Shapes,
        ref_windows: Tensor,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` between the two projections: ``projected`` is what :meth:`project_value` gave."""
        boxes, angles = self.predict_rotated_boxes(query, ref_windows)
        return ops.box_attention(
            projected,
            spatial_shapes,
            boxes,
            self.predict_logits(query),
            self.kernel_indices,
            valid_ratios=valid_ratios,
            angles=angles,
        )

    def predict_rotated_boxes(self, query: Tensor, ref_windows: Tensor) -> tuple[Tensor, Tensor]:
        """Move, scale and rotate the reference windows, see the class; ``query`` is ``[B, Q, C]``, position added.

        Returns:
            Boxes ``[B, Q, H, L, 4]`` and their angles ``[B, Q, H, L]`` in radians.
        """
        windows, offsets = _per_head(ref_windows), self._predict_offsets(query)
        boxes = _move_windows(windows[..., :4], offsets[..., :4])
        codes = windows[..., 4]
        if self.with_rotation:
            return boxes, 2 * math.pi * (codes + offsets[..., 4] / _ANGLE_SCALE)
        return boxes, codes.expand(boxes.shape[:-1])
