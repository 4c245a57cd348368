"""Registered heads."""

from boltz_mm.models.heads.boxer3d_head import BoxeR3DHead
from boltz_mm.models.heads.boxer_head import BoxeRHead
from boltz_mm.models.heads.boxer_mask_head import BoxeRMaskHead
from boltz_mm.models.heads.point_fusion_head import PointMaskFusionHead
from boltz_mm.models.heads.point_mask2former_head import PointMask2FormerHead
from boltz_mm.models.heads.point_mask2former_seg_head import PointMask2FormerSegHead
from boltz_mm.models.heads.point_pixel_decoder import PixelDecoderOutput, PointPixelDecoder

__all__ = [
    'BoxeR3DHead',
    'BoxeRHead',
    'BoxeRMaskHead',
    'PixelDecoderOutput',
    'PointMask2FormerHead',
    'PointMask2FormerSegHead',
    'PointMaskFusionHead',
    'PointPixelDecoder',
]
