"""Head of BoxeR-2D: classes, boxes and masks of queries, rating and boxes of encoder tokens, losses, results.

Source: BoxeR (CVPR 2022, section 3.3), official files ``module/predictor.py``, ``criterion/losses.py``,
``module/matcher.py`` and the post-processing of ``dataset/coco.py``.

Deviations, none of them in value unless said:

1. In training, classes and boxes of all layers come first; mask features and masks are computed for matched queries
   only.  Officially for all queries of all layers; the loss and its gradients are the same.
2. In inference masks are computed for the distinct queries of the results only.
3. Boxes of encoder tokens carry gradients only where a token is matched; no other token's box enters the loss.
4. First-stage matching solves a reduced problem (see ``ReducedHungarianAssigner``); exact ties may fall differently.
5. An empty mask gives score 0, officially NaN.  Results are sorted by score, officially in no order.
6. NaN predictions and labels out of range raise an error that names them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.losses import accuracy
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.registry import TASK_UTILS as MMDET_TASK_UTILS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh, get_box_tensor
from mmdet.structures.mask import BaseInstanceMasks
from mmdet.utils import InstanceList, reduce_mean
from mmengine.model import BaseModule, bias_init_with_prob
from mmengine.structures import InstanceData
from torch import Tensor, nn

from boltz_mm.models.layers.mask_grid import mask_targets, paste_masks
from boltz_mm.registry import MODELS
from boltz_mm.utils.dtypes import at_least_float32

MaskLogits = Callable[[int, list[Tensor]], Tensor]
"""Mask logits ``[R, m, m]`` of chosen queries of a decoder layer (-1 is the last): for each image the indexes ``[n_b]``
of its chosen queries go in, images one after the other come out."""

_ASSIGNER = dict(
    type='boltz_mm.ReducedHungarianAssigner',
    match_costs=[
        dict(type='mmdet.FocalLossCost', weight=2.0, eps=1e-8),
        dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
        dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
    ],
)


class FirstStage(NamedTuple):
    """Encoder tokens as the first stage sees them.

    Attributes:
        memory: ``[B, S, C]`` encoder output.
        ref_windows: ``[B, S, 4]`` windows (cx, cy, w, h) in 0..1.
        class_logits: ``[B, S, 1]`` rating, the lowest half-precision number where not usable.
        usable: ``[B, S]`` bool, neither padding nor border.
    """

    memory: Tensor
    ref_windows: Tensor
    class_logits: Tensor
    usable: Tensor


class Targets(NamedTuple):
    """Ground truth of one image.

    Attributes:
        labels: Int64 ``[n]``.
        corners: ``[n, 4]`` (x1, y1, x2, y2) in pixels.
        boxes: ``[n, 4]`` (cx, cy, w, h) in 0..1.
        factor: ``[4]`` (w, h, w, h) of the image in pixels.
        img_meta: ``img_shape`` and whatever else mmdet knows of the image.
    """

    labels: Tensor
    corners: Tensor
    boxes: Tensor
    factor: Tensor
    img_meta: dict


Matches = Sequence[tuple[Tensor, Tensor]]
"""For each image the indexes ``[n]`` of the matched predictions, ascending, and of their objects."""


@MODELS.register_module()
class BoxeRHead(BaseModule):
    """One class, box and mask predictor for all decoder layers, and one class and box predictor for tokens.

    Args:
        num_classes: Classes K (sigmoid, no background class).  91 for official COCO weights, whose labels are raw
            category ids.
        embed_dims: Channels C.
        num_reg_fcs: Hidden layers of the box MLPs.
        with_mask: Whether masks are predicted.
        loss_cls: Focal loss of all queries and tokens.
        loss_bbox: L1 loss of (cx, cy, w, h) in 0..1.
        loss_iou: GIoU loss of corners in pixels.
        loss_mask: Focal loss of mask logits on the grid of the matched box (``with_mask`` only).
        loss_dice: Dice loss of the same.
        train_cfg: ``assigner``: config of the matching.
        test_cfg: ``max_per_img`` (default 100) best pairs of query and class, or all pairs above ``score_thr`` if that
            is given; ``clip_boxes`` (default False, as official) keeps boxes inside the image.
        init_cfg: See mmengine's ``BaseModule``.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int = 256,
        num_reg_fcs: int = 2,
        with_mask: bool = False,
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        loss_iou: dict | None = None,
        loss_mask: dict | None = None,
        loss_dice: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.embed_dims = embed_dims
        self.with_mask = with_mask
        self.test_cfg = test_cfg or {}
        # Built in mmdet's registries, so that configs may name its losses and costs without a prefix.
        self.assigner = MMDET_TASK_UTILS.build((train_cfg or {}).get('assigner', _ASSIGNER))

        focal = dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25)
        dice = dict(type='mmdet.DiceLoss', use_sigmoid=True, activate=True, naive_dice=True, eps=1.0, loss_weight=5.0)
        self.loss_cls = MMDET_MODELS.build(loss_cls or dict(focal, loss_weight=2.0))
        self.loss_bbox = MMDET_MODELS.build(loss_bbox or dict(type='mmdet.L1Loss', loss_weight=5.0))
        self.loss_iou = MMDET_MODELS.build(loss_iou or dict(type='mmdet.GIoULoss', loss_weight=2.0))
        if with_mask:
            self.loss_mask = MMDET_MODELS.build(loss_mask or dict(focal, loss_weight=5.0))
            self.loss_dice = MMDET_MODELS.build(loss_dice or dice)

        self.cls_branch = nn.Linear(embed_dims, num_classes)
        self.reg_branch = _box_mlp(embed_dims, num_reg_fcs)
        self.enc_cls_branch = nn.Linear(embed_dims, 1)
        self.enc_reg_branch = _box_mlp(embed_dims, num_reg_fcs)
        if with_mask:
            self.mask_head = MODELS.build(
                dict(type='boltz_mm.BoxeRMaskHead', num_classes=num_classes, embed_dims=embed_dims)
            )

    def init_weights(self) -> None:
        """Start with probability 0.01 for each class and with boxes equal to their windows."""
        super().init_weights()
        for cls_branch, reg_branch in (
            (self.cls_branch, self.reg_branch),
            (self.enc_cls_branch, self.enc_reg_branch),
        ):
            nn.init.constant_(cls_branch.bias, bias_init_with_prob(0.01))
            for parameter in reg_branch[-1].parameters():
                nn.init.zeros_(parameter)

    # ----------------------------------------------------------------------------------------------- predictions

    def forward(self, hidden_states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Classes and boxes of queries.

        Args:
            hidden_states: ``[layers, B, Q, C]`` decoder outputs.
            references: ``[B, Q, 4]`` windows of the queries, the same for all layers.

        Returns:
            Class logits ``[layers, B, Q, K]`` and boxes ``[layers, B, Q, 4]`` (cx, cy, w, h) in 0..1, float32 at
            least.
        """
        cls_scores = at_least_float32(self.cls_branch(hidden_states))
        bbox_preds = at_least_float32(self.reg_branch(hidden_states)) + inverse_sigmoid(references)
        return cls_scores, bbox_preds.sigmoid()

    def forward_first_stage_boxes(self, memory: Tensor, ref_windows: Tensor, usable: Tensor) -> Tensor:
        """Boxes of encoder tokens.

        Args:
            memory: ``[..., C]`` tokens.
            ref_windows: ``[..., 4]`` their windows.
            usable: ``[...]`` bool, False for padding and border.

        Returns:
            ``[..., 4]`` (cx, cy, w, h) in 0..1, exactly 0 where not usable, float32 at least.
        """
        boxes = at_least_float32(self.enc_reg_branch(memory)) + inverse_sigmoid(ref_windows)
        return boxes.sigmoid().masked_fill(~usable.unsqueeze(-1), 0.0)

    def forward_masks(self, rois: Tensor, cls_scores: Tensor) -> Tensor:
        """Masks of queries, each for the class that the query itself predicts.

        Args:
            rois: ``[R, m, m, C]`` features.
            cls_scores: ``[R, K]`` class logits of the same queries.

        Returns:
            Logits ``[R, 2m, 2m]``.
        """
        return self.mask_head(rois, cls_scores.argmax(dim=-1))

    def _mask_logits(
        self, cls_scores: Tensor, compute_rois: Callable[[int, list[Tensor]], Tensor] | None
    ) -> MaskLogits | None:
        """Bind what the masks of chosen queries need, if there are any; ``cls_scores`` is ``[layers, B, Q, K]``."""
        if compute_rois is None:
            return None

        def mask_logits(layer: int, rows: list[Tensor]) -> Tensor:
            chosen = torch.cat([cls_scores[layer, image, row] for image, row in enumerate(rows)])
            return self.forward_masks(compute_rois(layer, rows), chosen)

        return mask_logits

    # -------------------------------------------------------------------------------------------------- training

    def loss(
        self,
        hidden_states: Tensor,
        references: Tensor,
        first_stage: FirstStage,
        batch_data_samples: SampleList,
        compute_rois: Callable[[int, list[Tensor]], Tensor] | None = None,
        num_boxes: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Losses of all decoder layers and of the first stage.

        Args:
            hidden_states: ``[layers, B, Q, C]``.
            references: ``[B, Q, 4]`` windows of the queries.
            first_stage: The encoder's tokens.
            batch_data_samples: Ground truth and meta information of each image.
            compute_rois: Maps a layer and, for each image, query indexes to features ``[R, m, m, C]``; needed
                ``with_mask``.
            num_boxes: See :meth:`loss_by_feat`.

        Returns:
            See :meth:`loss_by_feat`.
        """
        cls_scores, bbox_preds = self(hidden_states, references)
        tokens = (first_stage.memory, first_stage.ref_windows, first_stage.usable)
        with torch.no_grad():
            enc_bbox_preds = self.forward_first_stage_boxes(*tokens)

        def enc_boxes(rows: list[Tensor]) -> Tensor:
            chosen = (torch.cat([t[b, row] for b, row in enumerate(rows)]) for t in tokens)
            return self.forward_first_stage_boxes(*chosen)

        return self.loss_by_feat(
            cls_scores,
            bbox_preds,
            at_least_float32(first_stage.class_logits),
            enc_bbox_preds,
            [sample.gt_instances for sample in batch_data_samples],
            [sample.metainfo for sample in batch_data_samples],
            mask_logits=self._mask_logits(cls_scores, compute_rois),
            enc_boxes=enc_boxes,
            num_boxes=num_boxes,
        )

    def loss_by_feat(
        self,
        layers_cls_scores: Tensor | Sequence[Tensor],
        layers_bbox_preds: Tensor | Sequence[Tensor],
        enc_cls_scores: Tensor | None,
        enc_bbox_preds: Tensor | None,
        batch_gt_instances: InstanceList,
        batch_img_metas: list[dict],
        *,
        mask_logits: MaskLogits | None = None,
        enc_boxes: Callable[[list[Tensor]], Tensor] | None = None,
        num_boxes: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Match predictions with ground truth and compute all losses.

        Args:
            layers_cls_scores: Class logits ``[B, Q, K]`` of each decoder layer.
            layers_bbox_preds: Boxes ``[B, Q, 4]`` (cx, cy, w, h) in 0..1 of each decoder layer.
            enc_cls_scores: Ratings ``[B, S, 1]`` of the encoder's tokens, or ``None`` to leave the first stage out.
            enc_bbox_preds: Their boxes ``[B, S, 4]``.
            batch_gt_instances: ``labels`` ``[n]``, ``bboxes`` ``[n, 4]`` (x1, y1, x2, y2) in pixels and, ``with_mask``,
                ``masks`` of each image.
            batch_img_metas: ``img_shape`` of each image, which normalises its boxes.
            mask_logits: Computes masks of matched queries; needed ``with_mask``.
            enc_boxes: Computes boxes of matched tokens with gradients; ``enc_bbox_preds`` are taken if not given.
            num_boxes: Normaliser of all losses.  By default the number of objects of the batch, averaged over
                processes and at least 1.  Over several accumulated batches pass the sum of their objects, divided by
                their number if the optimizer wrapper divides the losses by it.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_iou`` (and ``loss_mask``, ``loss_dice``) of the last layer, of layer i
            as ``d{i}.*``, of the first stage as ``enc_*``, all weighted; ``accuracy``, in percent, of the last
            layer's matched queries.

        Raises:
            ValueError: A label is out of range, or masks are wanted and missing (or the other way round).
            FloatingPointError: A prediction is NaN or infinite.
        """
        if self.with_mask != (mask_logits is not None):
            raise ValueError(f'mask_logits must be given with with_mask=True and only then; with_mask={self.with_mask}')
        targets = self.make_targets(batch_gt_instances, batch_img_metas)
        if num_boxes is None:
            count = layers_bbox_preds[0].new_tensor(float(sum(len(t.labels) for t in targets)))
            num_boxes = reduce_mean(count).clamp(min=1)
        grids: list[Tensor] = []  # mask targets, made at the first mask loss and used for all layers

        losses: dict[str, Tensor] = {}
        last = len(layers_cls_scores) - 1
        for layer, (cls_scores, bbox_preds) in enumerate(zip(layers_cls_scores, layers_bbox_preds, strict=True)):
            matches = self.match(cls_scores, bbox_preds, targets)
            rows = [pred_inds for pred_inds, _ in matches]
            terms = self._box_losses(cls_scores, _take(bbox_preds, rows), targets, matches, num_boxes)
            if mask_logits is not None:
                logits = mask_logits(layer, rows)
                grids = grids or self._mask_targets(batch_gt_instances, targets, logits)
                terms |= self._mask_losses(logits, _take_matched(grids, matches), num_boxes)
            prefix = '' if layer == last else f'd{layer}.'
            losses |= {prefix + name: value for name, value in terms.items()}
            if layer == last:
                labels = _take_matched([t.labels for t in targets], matches)
                losses['accuracy'] = accuracy(_take(cls_scores, rows).detach(), labels).mean()
        if enc_cls_scores is not None and enc_bbox_preds is not None:
            losses |= self._first_stage_losses(enc_cls_scores, enc_bbox_preds, enc_boxes, targets, num_boxes)
        return losses

    def _first_stage_losses(
        self,
        cls_scores: Tensor,
        bbox_preds: Tensor,
        boxes_of: Callable[[list[Tensor]], Tensor] | None,
        targets: Sequence[Targets],
        num_boxes: Tensor | float,
    ) -> dict[str, Tensor]:
        """Losses of tokens ``[B, S, 1]``, ``[B, S, 4]``, whose one class is 'object'."""
        targets = [t._replace(labels=torch.zeros_like(t.labels)) for t in targets]
        matches = self.match(cls_scores, bbox_preds, targets)
        rows = [pred_inds for pred_inds, _ in matches]
        boxes = boxes_of(rows) if boxes_of else _take(bbox_preds, rows)
        terms = self._box_losses(cls_scores, boxes, targets, matches, num_boxes)
        return {f'enc_{name}': value for name, value in terms.items()}

    def make_targets(self, batch_gt_instances: InstanceList, batch_img_metas: list[dict]) -> list[Targets]:
        """Gather the ground truth of each image.

        Raises:
            ValueError: A label is out of range.
        """
        targets = []
        for gt, meta in zip(batch_gt_instances, batch_img_metas, strict=True):
            corners = get_box_tensor(gt.bboxes)
            height, width = _image_size(meta['img_shape'])
            factor = corners.new_tensor([width, height, width, height])
            targets.append(Targets(gt.labels, corners, bbox_xyxy_to_cxcywh(corners) / factor, factor, meta))
        labels = torch.cat([t.labels for t in targets])
        if labels.numel():
            low, high = torch.stack(labels.aminmax()).tolist()  # one device round trip for the batch
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f'label {low if low < 0 else high} does not fit num_classes={self.num_classes}: labels must be 0 '
                    f'to {self.num_classes - 1} (raw COCO category ids need num_classes=91)'
                )
        return targets

    @torch.no_grad()
    def match(self, cls_scores: Tensor, bbox_preds: Tensor, targets: Sequence[Targets]) -> list[tuple[Tensor, Tensor]]:
        """Match the predictions of each image with its objects.

        Args:
            cls_scores: ``[B, N, K]`` logits.
            bbox_preds: ``[B, N, 4]`` (cx, cy, w, h) in 0..1.
            targets: Ground truth of each image.

        Returns:
            For each image the indexes ``[n]`` of the matched predictions, ascending, and of their objects.
        """
        matches = []
        for scores, boxes, target in zip(cls_scores, bbox_preds, targets, strict=True):
            pred = InstanceData(scores=scores, bboxes=bbox_cxcywh_to_xyxy(boxes) * target.factor)
            gt = InstanceData(labels=target.labels, bboxes=target.corners)
            gt_inds = self.assigner.assign(pred, gt, target.img_meta).gt_inds
            matched = gt_inds.nonzero()[:, 0]
            matches.append((matched, gt_inds[matched] - 1))
        return matches

    def _box_losses(
        self,
        cls_scores: Tensor,
        boxes: Tensor,
        targets: Sequence[Targets],
        matches: Matches,
        num_boxes: Tensor | float,
    ) -> dict[str, Tensor]:
        """Class loss of all predictions ``[B, N, K]``, box losses of the matched ones ``[R, 4]``."""
        one_hot = torch.zeros_like(cls_scores)
        for image, (target, (pred_inds, gt_inds)) in enumerate(zip(targets, matches, strict=True)):
            one_hot[image, pred_inds, target.labels[gt_inds]] = 1
        wanted = _take_matched([t.boxes for t in targets], matches).to(boxes)
        corners = _take_matched([t.corners for t in targets], matches).to(boxes)
        factors = _take_matched([t.factor.expand(len(t.labels), 4) for t in targets], matches).to(boxes)
        return {
            'loss_cls': self.loss_cls(cls_scores.flatten(0, 1), one_hot.flatten(0, 1), avg_factor=num_boxes),
            'loss_bbox': self.loss_bbox(boxes, wanted, avg_factor=num_boxes),
            'loss_iou': self.loss_iou(bbox_cxcywh_to_xyxy(boxes) * factors, corners, avg_factor=num_boxes),
        }

    def _mask_losses(self, logits: Tensor, wanted: Tensor, num_boxes: Tensor | float) -> dict[str, Tensor]:
        """Losses of mask logits ``[R, m, m]`` against binary targets of the same shape."""
        logits, wanted = logits.flatten(1), wanted.flatten(1)
        return {
            'loss_mask': self.loss_mask(logits, wanted, avg_factor=num_boxes * logits.shape[1]),
            'loss_dice': self.loss_dice(logits, wanted, avg_factor=num_boxes),
        }

    def _mask_targets(self, batch_gt_instances: InstanceList, targets: Sequence[Targets], like: Tensor) -> list[Tensor]:
        """Binary mask targets ``[n, m, m]`` of each image, of the size, type and device of ``like`` ``[R, m, m]``."""
        grids = []
        for gt, target in zip(batch_gt_instances, targets, strict=True):
            if 'masks' not in gt:
                name = target.img_meta.get('img_path', 'an image')
                raise ValueError(
                    f"the head predicts masks, but for {name} ground truth has none: load it with 'with_mask=True'"
                )
            masks = _mask_tensor(gt.masks, target.img_meta['img_shape'])
            grids.append(mask_targets(masks, target.boxes.to(masks.device), like.shape[-1]).to(like))
        return grids

    # ------------------------------------------------------------------------------------------------- inference

    def predict(
        self,
        hidden_states: Tensor,
        references: Tensor,
        batch_data_samples: SampleList,
        compute_rois: Callable[[int, list[Tensor]], Tensor] | None = None,
        rescale: bool = True,
        **kwargs,
    ) -> InstanceList:
        """Results of the last decoder layer.

        Args:
            hidden_states: ``[layers, B, Q, C]``.
            references: ``[B, Q, 4]`` windows of the queries.
            batch_data_samples: Meta information of each image.
            compute_rois: As in :meth:`loss`.
            rescale: Give results in the original image instead of the resized one.
            **kwargs: What only training needs.

        Returns:
            See :meth:`predict_by_feat`.
        """
        cls_scores, bbox_preds = self(hidden_states[-1:], references)
        mask_logits = self._mask_logits(cls_scores, compute_rois)  # asked for layer -1
        metas = [sample.metainfo for sample in batch_data_samples]
        return self.predict_by_feat(cls_scores[-1], bbox_preds[-1], metas, mask_logits=mask_logits, rescale=rescale)

    def predict_by_feat(
        self,
        cls_scores: Tensor,
        bbox_preds: Tensor,
        batch_img_metas: list[dict],
        *,
        mask_logits: MaskLogits | None = None,
        rescale: bool = False,
    ) -> InstanceList:
        """Turn predictions into results.

        Args:
            cls_scores: ``[B, Q, K]`` logits.
            bbox_preds: ``[B, Q, 4]`` (cx, cy, w, h) in 0..1.
            batch_img_metas: ``img_shape`` of each image, and with ``rescale`` ``ori_shape`` and ``scale_factor``.
            mask_logits: Computes masks of chosen queries; called once, with layer -1.
            rescale: Give results in the original image instead of the resized one.

        Returns:
            For each image, by falling score: ``bboxes`` ``[n, 4]`` (x1, y1, x2, y2) in pixels, not clipped by default,
            ``scores`` ``[n]`` (with masks: class probability times mean mask probability), ``labels`` ``[n]``,
            ``query_inds`` ``[n]`` and, with masks, ``masks`` ``[n, H, W]`` bool.
        """
        results = [self._select(*image) for image in zip(cls_scores, bbox_preds, strict=True)]
        for result, meta in zip(results, batch_img_metas, strict=True):
            width, height = _result_factor(meta, rescale)
            result.bboxes = result.bboxes * result.bboxes.new_tensor([width, height, width, height])
        sizes = [_image_size(meta['ori_shape' if rescale else 'img_shape']) for meta in batch_img_metas]
        if mask_logits is not None:
            self._add_masks(results, mask_logits, sizes)
        if self.test_cfg.get('clip_boxes', False):
            for result, (h, w) in zip(results, sizes, strict=True):
                result.bboxes = torch.minimum(result.bboxes.clamp(min=0), result.bboxes.new_tensor([w, h, w, h]))
        return [result[result.scores.argsort(descending=True, stable=True)] for result in results]

    @staticmethod
    def _add_masks(results: InstanceList, mask_logits: MaskLogits, sizes: Sequence[tuple[int, int]]) -> None:
        """Paste masks into images of the given (h, w) and weigh scores by them.

        Several results may come from one query: its mask is computed and pasted once.
        """
        distinct = [result.query_inds.unique(return_inverse=True) for result in results]
        probs = mask_logits(-1, [queries for queries, _ in distinct]).sigmoid()
        parts = probs.split([len(queries) for queries, _ in distinct])
        for result, part, (queries, inverse), size in zip(results, parts, distinct, sizes, strict=True):
            boxes = result.bboxes.new_empty(len(queries), 4)
            boxes[inverse] = result.bboxes
            masks, qualities = paste_masks(part, boxes, size)
            result.masks = masks[inverse]
            result.scores = result.scores * qualities[inverse]

    def _select(self, cls_scores: Tensor, bbox_preds: Tensor) -> InstanceData:
        """The best pairs of query and class of one image, boxes as corners in 0..1."""
        probs = cls_scores.sigmoid().flatten()
        threshold = self.test_cfg.get('score_thr')
        if threshold is not None:
            indexes = (probs > threshold).nonzero()[:, 0]
        else:
            indexes = probs.topk(min(self.test_cfg.get('max_per_img', 100), len(probs))).indices
        queries = indexes // self.num_classes
        return InstanceData(
            bboxes=bbox_cxcywh_to_xyxy(bbox_preds[queries]),
            scores=probs[indexes],
            labels=indexes % self.num_classes,
            query_inds=queries,
        )


def _box_mlp(embed_dims: int, num_fcs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_fcs):
        layers += [nn.Linear(embed_dims, embed_dims), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(embed_dims, 4))


def _take(values: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Rows of ``values`` ``[B, N, D]``: ``[sum of n_b, D]``, images one after the other."""
    return torch.cat([values[image, row] for image, row in enumerate(rows)])


def _take_matched(values: Sequence[Tensor], matches: Matches) -> Tensor:
    """Values of the matched objects, images one after the other; ``values`` are ``[n, ...]`` for each image."""
    return torch.cat([value[gt_inds] for value, (_, gt_inds) in zip(values, matches, strict=True)])


def _image_size(shape: Sequence[int]) -> tuple[int, int]:
    """(h, w) of an image shape (h, w, ...)."""
    return int(shape[0]), int(shape[1])


def _mask_tensor(masks: Tensor | BaseInstanceMasks, shape: Sequence[int]) -> Tensor:
    """Masks of mmdet (on the CPU) or a tensor, cut to the unpadded image: ``[n, h, w]``."""
    if not isinstance(masks, Tensor):
        masks = torch.from_numpy(masks.to_ndarray())
    return masks[:, : shape[0], : shape[1]]


def _result_factor(meta: dict, rescale: bool) -> tuple[float, float]:
    """Width and height in pixels of the image that normalised boxes refer to, after undoing the resize if wanted."""
    height, width = meta['img_shape'][:2]
    if not rescale:
        return float(width), float(height)
    scale_width, scale_height = meta['scale_factor'][:2]
    return float(width / scale_width), float(height / scale_height)
