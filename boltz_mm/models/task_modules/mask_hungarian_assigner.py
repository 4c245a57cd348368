"""Hungarian matching of masks that are given by their values at sampled points.

Source: Mask2Former (CVPR 2022), official file ``matcher.py`` as carried by apple/ml-autofocusformer-segmentation.
Costs are mmdet's match costs.

Deviations: the costs of all images go to the host together; NaN or infinite costs are named instead of left to scipy.

Held by the golden cases ``matcher_cost`` and ``criterion_*`` of AutoFocusFormer.
"""

import numpy as np
import torch
from mmdet.models.task_modules.assigners import AssignResult, HungarianAssigner
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from boltz_mm.registry import TASK_UTILS


@TASK_UTILS.register_module()
class MaskHungarianAssigner(HungarianAssigner):
    """One-to-one matching of queries and objects by class and by mask values at common points.

    Args:
        match_costs: Configs of mmdet's match costs, one or several.
    """

    @torch.no_grad()
    def cost(self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None = None) -> Tensor:
        """The weighted sum of all costs of one image.

        Args:
            pred_instances: ``scores`` (logits) ``[Q, K + 1]`` and ``masks`` (logits at the points) ``[Q, P]``.
            gt_instances: ``labels`` ``[n]`` and ``masks`` (values at the points) ``[n, P]``.
            img_meta: Handed on to the costs.

        Returns:
            ``[Q, n]``.
        """
        costs = [c(pred_instances=pred_instances, gt_instances=gt_instances, img_meta=img_meta)
                 for c in self.match_costs]  # fmt: skip
        return torch.stack(costs).sum(dim=0)

    def solve(self, costs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The cheapest assignment of each image; one transfer to the host and one back for all of them.

        Args:
            costs: ``[Q, n_i]`` of each image.

        Returns:
            For each image the matched queries, ascending, and their objects, both int64 ``[min(Q, n_i)]`` on the
            device of the costs.

        Raises:
            FloatingPointError: A cost is NaN or infinite.
        """
        if not costs:
            return []
        flat = torch.cat([c.detach().flatten() for c in costs]).cpu()
        if not bool(flat.isfinite().all()):
            bad = int((~flat.isfinite()).sum())
            raise FloatingPointError(
                f'{bad} of {flat.numel()} matching costs are NaN or infinite, so queries cannot be matched to objects: '
                'training has diverged or the input is not finite'
            )
        parts = flat.split([c.numel() for c in costs])
        pairs = [linear_sum_assignment(part.view(c.shape).numpy()) for part, c in zip(parts, costs, strict=True)]
        matched = torch.from_numpy(np.concatenate([np.stack(pair) for pair in pairs], axis=1)).to(costs[0].device)
        return [tuple(pair) for pair in matched.split([len(pair[0]) for pair in pairs], dim=1)]

    def assign(
        self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None = None, **kwargs
    ) -> AssignResult:
        """Match one image, in mmdet's form.

        Args:
            pred_instances: As in :meth:`cost`.
            gt_instances: As in :meth:`cost`.
            img_meta: As in :meth:`cost`.
            **kwargs: Ignored, part of mmdet's interface.

        Returns:
            ``gt_inds`` ``[Q]``: 0 for "no object", otherwise 1 + the index of the object; ``labels`` ``[Q]``: -1 or
            the label of the object.

        Raises:
            FloatingPointError: A cost is NaN or infinite.
        """
        labels = gt_instances.labels
        gt_inds = labels.new_zeros(len(pred_instances), dtype=torch.long)
        pred_labels = labels.new_full((len(pred_instances),), -1, dtype=torch.long)
        if len(gt_instances) and len(pred_instances):
            [(queries, objects)] = self.solve([self.cost(pred_instances, gt_instances, img_meta)])
            gt_inds[queries] = objects + 1
            pred_labels[queries] = labels[objects]
        return AssignResult(num_gts=len(gt_instances), gt_inds=gt_inds, max_overlaps=None, labels=pred_labels)
