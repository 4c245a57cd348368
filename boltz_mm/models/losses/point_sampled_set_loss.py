"""The set loss of Mask2Former: matching and mask losses on sampled points.

Source: Mask2Former (CVPR 2022, arXiv 2112.01527), official files ``criterion.py`` and ``matcher.py`` as carried by
apple/ml-autofocusformer-segmentation; point sampling as in PointRend (detectron2).

It differs from mmdet's ``Mask2FormerHead.loss_by_feat`` as the official code does: the mask terms are divided by the
number of all objects of the batch (mmdet counts each image without objects as one, and the matched objects only), and
the last prediction is evaluated first, which fixes the order of the random draws.

Held by the golden cases ``criterion_*`` and ``matcher_cost`` of AutoFocusFormer.
"""

from collections.abc import Sequence

import torch
from mmcv.ops import point_sample
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor, nn

from boltz_mm.registry import MODELS, TASK_UTILS

Match = tuple[Tensor, Tensor]
"""Matched queries, ascending, and their objects of one image."""

OFFICIAL_ASSIGNER = {
    'type': 'boltz_mm.MaskHungarianAssigner',
    'match_costs': [
        {'type': 'mmdet.ClassificationCost', 'weight': 2.0},
        {'type': 'mmdet.CrossEntropyLossCost', 'weight': 5.0, 'use_sigmoid': True},
        {'type': 'mmdet.DiceCost', 'weight': 5.0, 'pred_act': True, 'eps': 1.0},
    ],
}
OFFICIAL_LOSS_MASK = {'type': 'mmdet.CrossEntropyLoss', 'use_sigmoid': True, 'reduction': 'mean', 'loss_weight': 5.0}
OFFICIAL_LOSS_DICE = {
    'type': 'mmdet.DiceLoss',
    'use_sigmoid': True,
    'activate': True,
    'reduction': 'mean',
    'naive_dice': True,
    'eps': 1.0,
    'loss_weight': 5.0,
}


def official_loss_cls(num_classes: int) -> dict:
    """Cross-entropy in which "no object" counts a tenth."""
    return {
        'type': 'mmdet.CrossEntropyLoss',
        'use_sigmoid': False,
        'loss_weight': 2.0,
        'reduction': 'mean',
        'class_weight': [1.0] * num_classes + [0.1],
    }


@MODELS.register_module()
class PointSampledSetLoss(nn.Module):
    """Class, mask and dice loss of each prediction after matching it to the objects.

    Both matching and mask losses look at ``num_points`` points of a mask: the matching at uniform ones, common to all
    masks of an image; the losses for each mask at the most uncertain of ``oversample_ratio`` times as many candidates,
    filled up by uniform ones.

    Attributes:
        rand: Where all draws come from, ``torch.rand`` unless replaced; called with a size and ``device``.

    Args:
        num_classes: Classes ``K`` without the one for "no object".
        loss_cls: Config of the class loss over K + 1 classes; its ``class_weight`` also normalises it.  ``None``: the
            official one.
        loss_mask: Config of the point-wise mask loss.  ``None``: the official one.
        loss_dice: Config of the dice loss.  ``None``: the official one.
        assigner: Config of a :class:`MaskHungarianAssigner`.  ``None``: the official one.
        num_points: Points ``P``.
        oversample_ratio: Candidates per point.
        importance_sample_ratio: Share of the points that is taken from the candidates.

    Raises:
        ValueError: A number or ratio is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        loss_cls: dict | None = None,
        loss_mask: dict | None = None,
        loss_dice: dict | None = None,
        assigner: dict | None = None,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        if num_points < 1:
            raise ValueError(f'num_points must be positive, got {num_points}')
        if not 0 <= importance_sample_ratio <= 1:
            raise ValueError(f'importance_sample_ratio must be within 0..1, got {importance_sample_ratio}')
        if oversample_ratio < max(1.0, importance_sample_ratio):
            raise ValueError(f'oversample_ratio must be at least 1, got {oversample_ratio}')
        self.num_classes = num_classes
        loss_cls = loss_cls or official_loss_cls(num_classes)
        self.class_weight = list(loss_cls.get('class_weight') or [1.0] * (num_classes + 1))
        if len(self.class_weight) != num_classes + 1:
            raise ValueError(f'class_weight must have {num_classes + 1} numbers, got {len(self.class_weight)}')
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_mask = MODELS.build(loss_mask or OFFICIAL_LOSS_MASK)
        self.loss_dice = MODELS.build(loss_dice or OFFICIAL_LOSS_DICE)
        self.assigner = TASK_UTILS.build(assigner or OFFICIAL_ASSIGNER)
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(importance_sample_ratio * num_points)
        self.rand = torch.rand

    def forward(
        self, all_classes: Sequence[Tensor], all_masks: Sequence[Tensor], targets: Sequence[InstanceData]
    ) -> dict[str, Tensor]:
        """Losses of all predictions, weighted.

        Args:
            all_classes: Class logits ``[B, Q, K + 1]`` of each prediction, the final one last.
            all_masks: Mask logits ``[B, Q, h, w]`` of each prediction.
            targets: ``labels`` ``[n]`` and ``masks`` (of any type) ``[n, H, W]`` of each image, padded to the size
                that the mask logits stand for.

        Returns:
            ``loss_cls``, ``loss_mask``, ``loss_dice`` of the last prediction and ``d{i}.loss_*`` of the others.

        Raises:
            ValueError: A label is out of range (looked at on the CPU only).
            FloatingPointError: A matching cost is NaN or infinite.
        """
        labels = [t.labels for t in targets]
        self._check_labels(labels)
        dtype = torch.promote_types(all_masks[-1].dtype, torch.float32)
        masks = [t.masks for t in targets]
        # All objects count, those too that no query is left for.
        count = all_masks[-1].new_tensor([sum(len(x) for x in labels)], dtype=dtype)
        num_masks = reduce_mean(count).clamp(min=1)

        losses: dict[str, Tensor] = {}
        last = len(all_classes) - 1
        with torch.autocast(all_masks[-1].device.type, enabled=False):
            for i in (last, *range(last)):
                classes, logits = all_classes[i].to(dtype), all_masks[i].to(dtype)
                matches = self.match(classes, logits, labels, masks)
                terms = self.compute(classes, logits, labels, masks, matches, num_masks)
                prefix = '' if i == last else f'd{i}.'
                losses |= {prefix + name: value for name, value in terms.items()}
        return losses

    def _check_labels(self, labels: list[Tensor]) -> None:
        for i, own in enumerate(labels):
            if (
                own.device.type == 'cpu'
                and own.numel()
                and not 0 <= int(own.min()) <= int(own.max()) < self.num_classes
            ):
                raise ValueError(f'labels of image {i} must be within 0..{self.num_classes - 1}, got {own.tolist()}')

    @torch.no_grad()
    def match(self, classes: Tensor, logits: Tensor, labels: list[Tensor], masks: list[Tensor]) -> list[Match]:
        """Match the queries of each image to its objects.

        Args:
            classes: Class logits ``[B, Q, K + 1]``.
            logits: Mask logits ``[B, Q, h, w]``.
            labels: Labels of each image ``[n]``.
            masks: Masks of each image, of any type, ``[n, H, W]``.

        Returns:
            A match for each image.
        """
        return self.assigner.solve([self.cost(*image) for image in zip(classes, logits, labels, masks, strict=True)])

    def cost(self, classes: Tensor, logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        """Cost ``[Q, n]`` of matching the queries of one image to its objects; draws its points."""
        points = self.rand((1, self.num_points, 2), device=logits.device).to(logits.dtype)
        # Masks as channels: the points are common to all of them.
        logits, values = (
            point_sample(m[None].to(points), points)[0] if len(m) else points.new_zeros(0, self.num_points)
            for m in (logits, masks)
        )
        return self.assigner.cost(InstanceData(scores=classes, masks=logits), InstanceData(labels=labels, masks=values))

    def compute(
        self,
        classes: Tensor,
        logits: Tensor,
        labels: list[Tensor],
        masks: list[Tensor],
        matches: list[Match],
        num_masks: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of one prediction.

        Args:
            classes: As in :meth:`match`.
            logits: As in :meth:`match`.
            labels: As in :meth:`match`.
            masks: As in :meth:`match`.
            matches: What :meth:`match` gave.
            num_masks: What the mask terms are divided by, ``[1]``.

        Returns:
            ``loss_cls``, ``loss_mask``, ``loss_dice``.
        """
        wanted = classes.new_full(classes.shape[:2], self.num_classes, dtype=torch.long)
        for row, own, (queries, objects) in zip(wanted, labels, matches, strict=True):
            row[queries] = own[objects]
        wanted = wanted.flatten()
        weight = classes.new_tensor(self.class_weight)
        loss_cls = self.loss_cls(classes.flatten(0, 1), wanted, avg_factor=weight[wanted].sum())

        logits = torch.cat([image[queries] for image, (queries, _) in zip(logits, matches, strict=True)])
        points = self.draw_points(logits.detach())
        if not len(logits):
            nothing = logits.sum()  # keeps the mask branch in the graph
            return {'loss_cls': loss_cls, 'loss_mask': nothing, 'loss_dice': nothing}
        sampled = point_sample(logits[:, None], points)[:, 0]
        with torch.no_grad():
            chunks = points.split([len(queries) for queries, _ in matches])
            parts = [
                point_sample(own[objects][:, None].to(part), part)[:, 0]
                for own, (_, objects), part in zip(masks, matches, chunks, strict=True)
                if len(objects)
            ]
            values = torch.cat(parts)
        loss_dice = self.loss_dice(sampled, values, avg_factor=num_masks)
        loss_mask = self.loss_mask(sampled.flatten(), values.flatten(), avg_factor=num_masks * self.num_points)
        return {'loss_cls': loss_cls, 'loss_mask': loss_mask.sum(), 'loss_dice': loss_dice.sum()}

    @torch.no_grad()
    def draw_points(self, logits: Tensor) -> Tensor:
        """Points (x, y) in 0..1 for each mask: uncertain ones first, then uniform ones.

        Args:
            logits: Mask logits ``[M, h, w]``.

        Returns:
            ``[M, P, 2]``.
        """
        count, device, dtype = len(logits), logits.device, logits.dtype
        candidates = self.rand((count, self.num_candidates, 2), device=device).to(dtype)
        uniform = self.rand((count, self.num_points - self.num_uncertain, 2), device=device).to(dtype)
        if not count:
            return candidates[:, : self.num_points]
        certainty = point_sample(logits[:, None], candidates)[:, 0].abs()
        chosen = certainty.topk(self.num_uncertain, dim=1, largest=False, sorted=False).indices
        return torch.cat((candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), uniform), dim=1)
