"""Input projections of BoxeR.

Source: BoxeR, official file ``model/boxer2d.py``.  As mmdet's ``ChannelMapper`` with a bias before the norm, which the
official weights have, and a ReLU before the fifth and later levels.
"""

import torch.nn.functional as F
from mmdet.models.necks import ChannelMapper
from torch import Tensor

from boltz_mm.registry import MODELS


@MODELS.register_module()
class BoxeRNeck(ChannelMapper):
    """Project backbone features to one width and add coarser levels.

    Levels of the backbone: convolution 1 x 1 and group norm.  First extra level: convolution 3 x 3 of stride 2 on the
    last **backbone** feature, and group norm.  Further levels: the same on the ReLU of the level before.

    Args:
        in_channels: Channels of each backbone feature.
        out_channels: Channels C of each level.
        num_outs: Number of levels, at least ``len(in_channels)``.
        norm_cfg: Norm after each convolution.
        init_cfg: Initialisation; officially Xavier uniform with bias 0.
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=1,
            norm_cfg=norm_cfg or dict(type='GN', num_groups=32),
            act_cfg=None,
            bias=True,
            num_outs=num_outs,
            init_cfg=init_cfg or dict(type='Xavier', layer='Conv2d', distribution='uniform'),
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Project features.

        Args:
            inputs: One feature ``[B, C_l, H_l, W_l]`` for each of ``in_channels``.

        Returns:
            ``num_outs`` features ``[B, C, H_l, W_l]``.

        Raises:
            ValueError: The number of features is not that of ``in_channels``.
        """
        if len(inputs) != len(self.convs):
            raise ValueError(f'expected {len(self.convs)} features, got {len(inputs)}')
        outs = [conv(feature) for conv, feature in zip(self.convs, inputs, strict=True)]
        for i, conv in enumerate(self.extra_convs or ()):
            outs.append(conv(inputs[-1] if i == 0 else F.relu(outs[-1])))
        return tuple(outs)
