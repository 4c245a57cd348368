"""Loss on the axis-aligned generalised IoU of 3D boxes, as in BoxeR-3D (official ``Boxer3DLoss``)."""

from mmdet.models.losses.utils import weight_reduce_loss
from torch import Tensor, nn

from boltz_mm.models.task_modules.box3d_overlaps import giou_3d
from boltz_mm.registry import MODELS


@MODELS.register_module()
class Box3dGIoULoss(nn.Module):
    """``1 - GIoU`` of paired boxes; headings are ignored.

    Args:
        reduction: 'none', 'mean' or 'sum'.
        loss_weight: Weight of the loss.
    """

    def __init__(self, reduction: str = 'mean', loss_weight: float = 1.0) -> None:
        super().__init__()
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: float | Tensor | None = None
    ) -> Tensor:
        """Compare paired boxes.

        Args:
            pred: Float tensor ``[N, 6 or 7]``: centre x, y, z, sizes, heading.
            target: Same shape.
            weight: Weight of each pair ``[N]``.
            avg_factor: What the sum is divided by where the reduction is 'mean'; the number of pairs by default.

        Returns:
            Scalar, or ``[N]`` for the reduction 'none'.
        """
        loss = 1 - giou_3d(pred, target)
        return self.loss_weight * weight_reduce_loss(loss, weight, self.reduction, avg_factor)
