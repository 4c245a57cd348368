"""Deformable attention of any OpenMMLab model through :func:`boltz_mm.ops.deform_attention`.

"Deformable DETR" (arXiv 2010.04159), as mmcv's ``MultiScaleDeformableAttention`` has it.  Two ways in:

- write ``type='boltz_mm.MultiScaleDeformableAttention'`` where a config names the module's type;
- where a library names the class in its code (mmdet's Deformable DETR, DINO and Grounding DINO, the pixel decoder of
  Mask2Former), switch mmcv's modules over, for a block or until told otherwise::

      with native_deform_attention():
          runner.train()

Weights, configs and numbers stay as they are.  What changes: on a CPU (with the library built) the fused kernel instead
of one ``grid_sample`` per level; float16 and bfloat16 values with float32 coordinates (mmcv rounds the coordinates to
the type of the values); any batch size (mmcv wants a multiple of ``im2col_step``); no wait for the device to check
``spatial_shapes``.
"""

from types import TracebackType
from typing import Any, ClassVar

import torch
from mmcv.ops import MultiScaleDeformableAttention, multi_scale_deform_attn
from mmengine.utils import deprecated_api_warning
from torch import Tensor

from boltz_mm.ops import deform_attention
from boltz_mm.registry import MODELS


@MODELS.register_module(name='MultiScaleDeformableAttention')
class NativeMultiScaleDeformableAttention(MultiScaleDeformableAttention):
    """mmcv's ``MultiScaleDeformableAttention`` with our operator: same arguments, parameters and initialisation.

    ``im2col_step`` is accepted and without effect.
    """

    @deprecated_api_warning({'residual': 'identity'}, cls_name='MultiScaleDeformableAttention')
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[Q, B, C]``, or ``[B, Q, C]`` if ``batch_first``; so are ``value``, ``identity``, ``query_pos``
                and the result.
            key: Not used.
            value: ``[S, B, C]`` tokens of all levels; ``query`` if not given.
            identity: What the result is added to; ``query`` before the position if not given.
            query_pos: Position embedding, added to ``query``.
            key_padding_mask: ``[B, S]`` bool, True at padding.
            reference_points: ``[B, Q, L, 2]`` points (x, y), or ``[B, Q, L, 4]`` boxes (cx, cy, w, h), in 0..1 of the
                padded image.
            spatial_shapes: ``[L, 2]`` int64, height and width of each level.
            level_start_index: Not used: it follows from ``spatial_shapes``.
            **kwargs: Not used.

        Returns:
            ``[Q, B, C]``.

        Raises:
            ValueError: ``reference_points`` or ``spatial_shapes`` are missing; the former are neither points nor boxes,
                or the latter do not fit ``value``.
        """
        if reference_points is None or spatial_shapes is None:
            missing = 'reference_points' if reference_points is None else 'spatial_shapes'
            raise ValueError(f'reference_points and spatial_shapes must be given, got None for {missing}')
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))  # [B, S, H, D]
        offsets = self.sampling_offsets(query).unflatten(
            -1, (self.num_heads, self.num_levels, self.num_points, 2)
        )  # [B, Q, H, L, P, 2]
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))  # [B, Q, H, L, P]
        locations = self._locations(offsets, reference_points, spatial_shapes)
        output = self.output_proj(deform_attention(value, spatial_shapes, locations, weights))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity

    def _locations(self, offsets: Tensor, reference_points: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Sampling locations ``[B, Q, H, L, P, 2]``, float32 at least."""
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(f'reference_points must hold 2 or 4 numbers each, got {reference_points.shape[-1]}')
        dtype = torch.promote_types(torch.promote_types(offsets.dtype, reference_points.dtype), torch.float32)
        offsets = offsets.to(dtype)
        reference = reference_points.to(dtype)[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 2:
            sizes = spatial_shapes.flip(-1)[:, None]  # [L, 1, (w, h)]
            return reference + offsets / sizes
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5


class _OurFunction:
    """Stands where mmcv's autograd function stood."""

    @staticmethod
    def apply(
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        locations: Tensor,
        weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return deform_attention(value, spatial_shapes, locations, weights)


class DeformAttentionSwitch:
    """What :func:`native_deform_attention` returns: ends the change by :meth:`restore` or at the end of a block."""

    _REPLACEMENTS: ClassVar[dict[str, Any]] = {
        'MultiScaleDeformableAttnFunction': _OurFunction,
        'multi_scale_deformable_attn_pytorch': deform_attention,
    }
    _originals: ClassVar[dict[str, Any]] = {}
    _active: ClassVar[int] = 0

    def __init__(self) -> None:
        cls = type(self)
        if not cls._active:
            cls._originals = {name: getattr(multi_scale_deform_attn, name) for name in cls._REPLACEMENTS}
            self._set(cls._REPLACEMENTS)
        cls._active += 1
        self._restored = False

    def restore(self) -> None:
        """End this change; a second call does nothing."""
        if self._restored:
            return
        self._restored = True
        cls = type(self)
        cls._active -= 1
        if not cls._active:
            self._set(cls._originals)

    @staticmethod
    def _set(functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            setattr(multi_scale_deform_attn, name, function)

    def __enter__(self) -> 'DeformAttentionSwitch':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def native_deform_attention() -> DeformAttentionSwitch:
    """Let all of mmcv's deformable attention modules, existing and future ones, compute through our operator.

    The change is made at once.  It may be nested; the last one to end brings mmcv's own functions back.  It is one
    switch for the whole process, not for a thread.

    Returns:
        A handle: use it in a ``with`` statement, or call its ``restore``.

    Examples:
        >>> with native_deform_attention():
        ...     pass  # train or test any model with deformable attention
        >>> handle = native_deform_attention()
        >>> handle.restore()
    """
    return DeformAttentionSwitch()
