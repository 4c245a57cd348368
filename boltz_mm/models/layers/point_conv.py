"""Convolution of a token set: neighbours weighted by a small network of their offset.

Paper: "AutoFocusFormer: Image Segmentation off the Grid" (CVPR 2023, arXiv 2304.12406), after PointConv (CVPR 2019).
Official code: apple/ml-autofocusformer-segmentation, ``pixel_decoder/msdeformattn_pc.py`` (``PointConv``).

The offset is query minus neighbour, the opposite of the backbone's merging.

Deviations: none in value.  The official code evaluates the weights for a table of 1023 x 1023 offsets; here they are
evaluated for the offsets that occur.

Held by the golden case ``point_conv``.
"""

from typing import cast

from torch import Tensor, nn

from boltz_mm.ops import point_merge

# Offsets are clamped to the range of the official table.
_MAX_OFFSET = 511
# Weights that each neighbour is given, and with each of them a copy of the features.
_INNER_CHANNELS = 4


class PointConv(nn.Module):
    """Mix each token with its neighbours.

    ``w_ij = GELU(LayerNorm(Linear(f(p_i - p_j))))`` with 4 channels and f the five features of an offset
    (:func:`boltz_mm.ops.offset_features`); ``y_i = Linear(LayerNorm(sum_j w_ij x_j))`` over 4 x ``in_channels``.

    Args:
        in_channels: Channels ``C`` of the tokens.
        out_channels: Channels of the result.
        bias: Of the last linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        linear, norm = nn.Linear(5, _INNER_CHANNELS), nn.LayerNorm(_INNER_CHANNELS)
        self.weight_net = nn.Sequential(linear, norm, nn.GELU())
        self.norm = nn.LayerNorm(_INNER_CHANNELS * in_channels)
        self.linear = nn.Linear(_INNER_CHANNELS * in_channels, out_channels, bias=bias)

    def forward(self, feat: Tensor, pos: Tensor, index: Tensor) -> Tensor:
        """Convolve.

        Args:
            feat: Features ``[B, N, C]``.
            pos: Positions (x, y) ``[B, N, 2]``.
            index: Neighbours of each token ``[B, N, k]``.

        Returns:
            ``[B, N, out_channels]``.
        """
        linear, norm = cast(nn.Linear, self.weight_net[0]), cast(nn.LayerNorm, self.weight_net[1])
        merged = point_merge(
            feat,
            query_pos=pos,
            key_pos=pos,
            index=index,
            weight=linear.weight,
            bias=linear.bias,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            sign=-1,
            max_offset=_MAX_OFFSET,
        )
        return self.linear(self.norm(merged))
