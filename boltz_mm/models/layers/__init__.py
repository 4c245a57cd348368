"""Registered layers."""

from boltz_mm.models.layers.box3d_transformer import (
    Box3dTransformerDecoder,
    Box3dTransformerDecoderLayer,
    Box3dTransformerEncoder,
    Box3dTransformerEncoderLayer,
)
from boltz_mm.models.layers.box_attention import Box3dAttention, BoxAttention, InstanceAttention
from boltz_mm.models.layers.box_position import BoxPositionalEncoding
from boltz_mm.models.layers.box_transformer import (
    BoxTransformerDecoder,
    BoxTransformerDecoderLayer,
    BoxTransformerEncoder,
    BoxTransformerEncoderLayer,
)
from boltz_mm.models.layers.deform_attention import NativeMultiScaleDeformableAttention, native_deform_attention
from boltz_mm.models.layers.point_conv import PointConv
from boltz_mm.models.layers.point_deform_attention import PointDeformAttention, PointDeformEncoder, PointLevels
from boltz_mm.models.layers.point_masked_decoder import PointMaskedDecoder
from boltz_mm.models.layers.point_position import PointSineEncoding

__all__ = [
    'Box3dAttention',
    'Box3dTransformerDecoder',
    'Box3dTransformerDecoderLayer',
    'Box3dTransformerEncoder',
    'Box3dTransformerEncoderLayer',
    'BoxAttention',
    'BoxPositionalEncoding',
    'BoxTransformerDecoder',
    'BoxTransformerDecoderLayer',
    'BoxTransformerEncoder',
    'BoxTransformerEncoderLayer',
    'InstanceAttention',
    'NativeMultiScaleDeformableAttention',
    'PointConv',
    'PointDeformAttention',
    'PointDeformEncoder',
    'PointLevels',
    'PointMaskedDecoder',
    'PointSineEncoding',
    'native_deform_attention',
]
