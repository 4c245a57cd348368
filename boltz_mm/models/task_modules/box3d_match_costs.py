"""Costs for matching 3D predictions to objects, on box codes (x, y, z, l, w, h, heading), all in 0..1.

Source: BoxeR, official ``module/matcher.py::HungarianMatcher3d``.  The interface is that of mmdet's match costs:
``pred_instances.bboxes`` is ``[M, 7]``, ``gt_instances.bboxes`` is ``[N, 7]``, the cost is ``[M, N]``.
"""

import torch
from mmdet.models.task_modules.assigners.match_cost import BaseMatchCost
from mmengine.structures import InstanceData
from torch import Tensor

from boltz_mm.models.task_modules.box3d_overlaps import giou_3d
from boltz_mm.registry import TASK_UTILS


@TASK_UTILS.register_module()
class Box3dL1Cost(BaseMatchCost):
    """L1 distance of chosen numbers of the box codes.

    Args:
        columns: First and one past the last number compared: (0, 6) for centre and size, (6, 7) for the heading
            (which is not periodic here: codes 0 and 1 are 1 apart).
        weight: Weight of the cost.
    """

    def __init__(self, columns: tuple[int, int] = (0, 6), weight: float = 1.0) -> None:
        super().__init__(weight)
        self.columns = slice(*columns)

    def __call__(
        self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None = None, **kwargs
    ) -> Tensor:
        """Costs ``[M, N]`` of every pair."""
        predicted, wanted = pred_instances.bboxes[:, self.columns], gt_instances.bboxes[:, self.columns]
        return torch.cdist(predicted, wanted, p=1) * self.weight


@TASK_UTILS.register_module()
class Box3dGIoUCost(BaseMatchCost):
    """Minus the axis-aligned 3D GIoU of the box codes.

    Args:
        weight: Weight of the cost.
    """

    def __call__(
        self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None = None, **kwargs
    ) -> Tensor:
        """Costs ``[M, N]`` of every pair."""
        return -giou_3d(pred_instances.bboxes[:, None], gt_instances.bboxes) * self.weight
