"""Mask head of BoxeR: the logits of one class for each region, from the grid of features of instance attention.

Source: BoxeR (CVPR 2022, section 3.3), official file ``module/predictor.py`` (``mask_v1``).

Deviations, none of them in value: only the channel of the wanted class is computed (officially all K, of which one is
kept), and the convolutions, whose kernels do not overlap, are matrix products on rows of channels.
"""

from typing import cast

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from boltz_mm.registry import MODELS
from boltz_mm.utils.dtypes import at_least_float32


@MODELS.register_module()
class BoxeRMaskHead(BaseModule):
    """ConvTranspose 2 x 2, ReLU, Conv 1 x 1, ReLU, Conv 1 x 1 to one class.

    Args:
        num_classes: Classes K.
        embed_dims: Channels C of the region features.
        init_cfg: See mmengine's ``BaseModule``.
    """

    def __init__(self, num_classes: int, embed_dims: int = 256, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.embed_dims = embed_dims
        self.upsample = nn.ConvTranspose2d(embed_dims, embed_dims, 2, stride=2)
        self.conv = nn.Conv2d(embed_dims, embed_dims, 1)
        self.conv_logits = nn.Conv2d(embed_dims, num_classes, 1)

    def forward(self, rois: Tensor, labels: Tensor) -> Tensor:
        """Compute mask logits.

        Args:
            rois: Features ``[R, m, m, C]`` of R regions; R may be 0.
            labels: The class of each region, int64 ``[R]``, in 0..K-1.

        Returns:
            Logits ``[R, 2m, 2m]``, float32 (float64 for float64 features).
        """
        num_rois, size = rois.shape[:2]
        # Every input point becomes a 2 x 2 cell: its four points stay together until the end, so nothing is permuted.
        kernel = self.upsample.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 * 2 * C, C]
        bias = cast(Tensor, self.upsample.bias).repeat(4)
        x = F.linear(rois, kernel, bias).relu().unflatten(-1, (4, self.embed_dims))  # [R, m, m, 4, C]
        x = F.linear(x, self.conv.weight.flatten(1), self.conv.bias).relu()
        weight = self.conv_logits.weight.flatten(1)[labels]  # [R, C]
        logits = torch.bmm(x.flatten(1, 3), weight.unsqueeze(-1)).squeeze(-1)  # [R, m * m * 4]
        logits = logits + cast(Tensor, self.conv_logits.bias)[labels].unsqueeze(-1)
        logits = logits.view(num_rois, size, size, 2, 2).transpose(2, 3).reshape(num_rois, 2 * size, 2 * size)
        return at_least_float32(logits)
