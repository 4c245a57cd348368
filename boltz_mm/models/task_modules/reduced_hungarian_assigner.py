"""Hungarian matching on the few predictions that can take part in an optimal assignment.

The first stage of BoxeR matches every encoder token (about 20,000) to the objects of an image.  Of an optimal
one-to-one assignment there is always one in which each object has one of its n cheapest predictions (n = number of
objects): the other n - 1 objects can take at most n - 1 of them.  Solving over the union of these at most n^2 rows
gives the same total cost; only among exact ties another partner may be chosen.

Source: BoxeR, official file ``module/matcher.py`` (which solves over all rows); reduction: ours.
"""

import numpy as np
import torch
from mmdet.models.task_modules.assigners import AssignResult, HungarianAssigner
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from boltz_mm.registry import TASK_UTILS


def reduce_and_assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the assignment problem of a tall cost matrix.

    Args:
        cost: Finite costs ``[N, n]`` of N predictions and n objects, on any device.

    Returns:
        Matched prediction indexes, ascending, and their object indexes, both int64 ``[min(N, n)]`` on the device of
        ``cost``.
    """
    num_preds, num_gts = cost.shape
    rows = None
    if num_preds > num_gts * num_gts:
        rows = cost.topk(num_gts, dim=0, largest=False).indices.unique()
        cost = cost[rows]
    pred_inds, gt_inds = linear_sum_assignment(cost.cpu().numpy())
    pred_inds, gt_inds = torch.from_numpy(np.stack([pred_inds, gt_inds])).to(cost.device)
    return (pred_inds if rows is None else rows[pred_inds]), gt_inds


@TASK_UTILS.register_module()
class ReducedHungarianAssigner(HungarianAssigner):
    """mmdet's Hungarian assigner, exact on a reduced problem, in float32 at least, with a clear word on NaN.

    Args:
        match_costs: Configs of mmdet's match costs, one or several.
    """

    @torch.no_grad()
    def cost(self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None = None) -> Tensor:
        """The weighted sum of all costs.

        Args:
            pred_instances: ``scores`` (logits) ``[N, K]`` and ``bboxes`` ``[N, 4]`` (x1, y1, x2, y2) in pixels.
            gt_instances: ``labels`` ``[n]`` and ``bboxes`` ``[n, 4]`` in pixels.
            img_meta: Holds ``img_shape`` (h, w), by which box costs are normalised.

        Returns:
            Costs ``[N, n]``, float32 (float64 for float64 predictions).
        """
        device = pred_instances.bboxes.device
        dtype = torch.promote_types(pred_instances.bboxes.dtype, torch.float32)
        pred_instances, gt_instances = _cast(pred_instances, dtype), _cast(gt_instances, dtype)
        with torch.autocast(device.type, enabled=False):
            costs = [c(pred_instances=pred_instances, gt_instances=gt_instances, img_meta=img_meta)
                     for c in self.match_costs]  # fmt: skip
            return torch.stack(costs).sum(dim=0)

    def assign(
        self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None = None, **kwargs
    ) -> AssignResult:
        """Match predictions and objects one to one.

        Args:
            pred_instances: As in :meth:`cost`.
            gt_instances: As in :meth:`cost`.
            img_meta: As in :meth:`cost`.
            **kwargs: Ignored, part of mmdet's interface.

        Returns:
            ``gt_inds`` ``[N]``: 0 for background, otherwise 1 + the index of the object; ``labels`` ``[N]``: -1 or
            the label of the object.

        Raises:
            FloatingPointError: A prediction is NaN or infinite.
        """
        num_gts, num_preds = len(gt_instances), len(pred_instances)
        labels = gt_instances.labels
        gt_inds = labels.new_zeros(num_preds, dtype=torch.long)
        pred_labels = labels.new_full((num_preds,), -1, dtype=torch.long)
        if num_gts and num_preds:
            cost = self.cost(pred_instances, gt_instances, img_meta)
            # An infinite logit has a finite cost, so look at the predictions too (still one device round trip).
            values = [cost, *pred_instances.values()]
            if not bool(torch.stack([v.isfinite().all() for v in values]).all()):
                raise FloatingPointError(_blame(pred_instances, gt_instances))
            matched_preds, matched_gts = reduce_and_assign(cost)
            gt_inds[matched_preds] = matched_gts + 1
            pred_labels[matched_preds] = labels[matched_gts]
        return AssignResult(num_gts=num_gts, gt_inds=gt_inds, max_overlaps=None, labels=pred_labels)


def _cast(instances: InstanceData, dtype: torch.dtype) -> InstanceData:
    """Floating tensors of ``instances`` in ``dtype``, everything else as it is."""
    floating = {k: v.to(dtype) for k, v in instances.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return InstanceData(**{**dict(instances.items()), **floating})


def _blame(pred_instances: InstanceData, gt_instances: InstanceData) -> str:
    """Say which input made a matching cost NaN or infinite."""
    inputs = {f'predicted {k}': v for k, v in pred_instances.items()}
    inputs |= {f'ground-truth {k}': v for k, v in gt_instances.items() if k in ('bboxes', 'labels')}
    for name, value in inputs.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            return (
                f'{bad} of {value.numel()} {name} are NaN or infinite, so predictions cannot be matched to '
                'ground truth: training has diverged or the input is not finite'
            )
    return 'the matching cost is NaN or infinite although predictions and ground truth are finite'
