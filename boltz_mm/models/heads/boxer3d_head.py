"""Head of BoxeR-3D: proposals from the encoder, boxes from the decoder, their losses and detections.

Source: BoxeR (CVPR 2022, section 3.4) and the official files ``module/box3d_transformer.py`` (proposals),
``module/predictor.py`` (``MultiDetector3d``, ``Detector3d``), ``criterion/losses.py::Boxer3DLoss``,
``module/matcher.py::HungarianMatcher3d``.

Two orders of a box occur.  References, as attention uses them, are (cx, cy, w, h, angle, z, height); box codes, as
targets and predictions use them, are (x, y, z, length, width, height, heading).  Both are in 0..1 of the point cloud
range (:class:`~boltz_mm.models.task_modules.box3d_coder.Box3dCoder`).

Deviations, none of them in value: first-stage logits are computed once for the selection and for the loss; boxes of
anchors carry gradients only where matched; first-stage matching solves a reduced problem (see
``ReducedHungarianAssigner``), where exact ties may fall differently; detections are sorted by score.
"""

import math
from collections.abc import Sequence

import torch
from mmdet.models.layers import MLP, inverse_sigmoid
from mmdet.utils import reduce_mean
from mmengine.model import BaseModule
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from boltz_mm.models.layers.box3d_transformer import add_windows
from boltz_mm.models.layers.box_transformer import MASKED_LOGIT, Proposals
from boltz_mm.registry import MODELS, TASK_UTILS

# References to box codes.
_CODE_ORDER = (0, 1, 5, 2, 3, 6, 4)


@MODELS.register_module()
class BoxeR3DHead(BaseModule):
    """Class and box branches of both stages.

    The defaults are those of the published Waymo model.

    Args:
        num_classes: Classes of the decoder's branch.  The published five are unknown, vehicle, pedestrian, sign and
            cyclist; only vehicle and pedestrian were trained.
        embed_dims: Channels of memory and queries.
        num_anchors: Anchors of a token that become proposals: the first of the encoder's.
        bbox_coder: Config of the coder between metres and codes.
        loss_cls: Config of the classification loss, on one-hot targets.
        loss_bbox: Config of the loss on centre and size.
        loss_iou: Config of the loss on the overlap.
        loss_heading: Config of the loss on the heading code (not periodic, as published).
        train_cfg: ``dict(assigner=...)``, the matching of predictions to objects.
        test_cfg: ``dict(max_per_sample=125, score_thr=0.0)``.
        init_cfg: Config of the initialisation.
    """

    def __init__(
        self,
        num_classes: int = 5,
        embed_dims: int = 256,
        num_anchors: int = 3,
        bbox_coder: dict | None = None,
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        loss_iou: dict | None = None,
        loss_heading: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.embed_dims = embed_dims
        self.num_anchors = num_anchors
        self.bbox_coder = TASK_UTILS.build(bbox_coder or dict(type='boltz_mm.Box3dCoder'))
        self.loss_cls = MODELS.build(
            loss_cls or dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0)
        )
        self.loss_bbox = MODELS.build(loss_bbox or dict(type='mmdet.L1Loss', loss_weight=5.0))
        self.loss_iou = MODELS.build(loss_iou or dict(type='boltz_mm.Box3dGIoULoss', loss_weight=2.0))
        self.loss_heading = MODELS.build(loss_heading or dict(type='mmdet.L1Loss', loss_weight=4.0))
        self.assigner = TASK_UTILS.build((train_cfg or {}).get('assigner') or _published_assigner())
        self.test_cfg: dict = dict(max_per_sample=125, score_thr=0.0) | dict(test_cfg or {})

        self.enc_cls_branch = nn.Linear(embed_dims, num_anchors)
        self.enc_reg_branch = MLP(embed_dims, embed_dims, num_anchors * 7, 3)
        self.cls_branch = nn.Linear(embed_dims, num_classes)
        self.reg_branch = MLP(embed_dims, embed_dims, 7, 3)

    def init_weights(self) -> None:
        """Start with scores of 0.01 and with boxes that equal their references."""
        super().init_weights()
        for classifier in (self.enc_cls_branch, self.cls_branch):
            nn.init.constant_(classifier.bias, -math.log(99))
        for regressor in (self.enc_reg_branch, self.reg_branch):
            nn.init.zeros_(regressor.layers[-1].weight)
            nn.init.zeros_(regressor.layers[-1].bias)

    def forward_anchors(self, memory: Tensor, ref_windows: Tensor, usable: Tensor) -> Tensor:
        """Boxes of all anchors of some tokens, for the first-stage loss.

        Args:
            memory: Float ``[..., C]``.
            ref_windows: Float ``[..., H, 5]``; the first ``num_anchors`` windows of a token are its anchors.
            usable: Bool ``[..., num_anchors]``; the others get boxes of zeros.

        Returns:
            Box codes ``[..., num_anchors, 7]``.
        """
        offsets = self.enc_reg_branch(memory).unflatten(-1, (self.num_anchors, 7))
        boxes = add_windows(ref_windows[..., : self.num_anchors, :], offsets)
        return boxes.masked_fill(~usable.unsqueeze(-1), MASKED_LOGIT).sigmoid()[..., _CODE_ORDER]

    def forward(self, hidden_states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Classify and box the queries of every layer.

        Args:
            hidden_states: Float ``[layers, B, Q, C]``.
            references: Float ``[B, Q, 7]`` in 0..1.

        Returns:
            Logits ``[layers, B, Q, K]`` and box codes ``[layers, B, Q, 7]``.
        """
        boxes = self.reg_branch(hidden_states) + inverse_sigmoid(references, eps=1e-5)
        return self.cls_branch(hidden_states), boxes.sigmoid()[..., _CODE_ORDER]

    def loss(
        self,
        hidden_states: Tensor,
        proposals: Proposals,
        memory: Tensor,
        ref_windows: Tensor,
        batch_data_samples: Sequence[BaseDataElement],
    ) -> dict[str, Tensor]:
        """Losses of all decoder layers and of the first stage.

        Args:
            hidden_states: Float ``[layers, B, Q, C]``.
            proposals: The queries' references and the first stage's ratings.
            memory: Float ``[B, S, C]``.
            ref_windows: Float ``[1 or B, S, H, 5]``, windows of the tokens.
            batch_data_samples: One for each point cloud, with ``gt_instances_3d`` that holds ``bboxes_3d``
                ``[n, 7]`` (centre x, y, z, length, width, height in metres, heading in radians) and ``labels_3d``
                ``[n]``; n may be 0.

        Returns:
            Weighted losses, see :meth:`loss_by_feat`.
        """
        targets = [self.encode_targets(sample, memory.device) for sample in batch_data_samples]
        scores, codes = self(hidden_states, proposals.ref_windows)
        return self.loss_by_feat(scores, codes, proposals, memory, ref_windows, targets)

    def encode_targets(self, data_sample: BaseDataElement, device: torch.device) -> InstanceData:
        """Objects of a point cloud as labels ``[n]`` and box codes ``bboxes`` ``[n, 7]`` on a device.

        Raises:
            ValueError: Boxes or labels have a wrong shape, a box is not finite, or a label is not a class.
        """
        objects = data_sample.gt_instances_3d
        boxes = torch.as_tensor(objects.bboxes_3d, dtype=torch.float32, device=device)
        labels = torch.as_tensor(objects.labels_3d, dtype=torch.int64, device=device)
        if boxes.dim() != 2 or boxes.shape[1] != 7 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f'bboxes_3d must be [n, 7] and labels_3d [n], got {list(boxes.shape)} and {list(labels.shape)}'
            )
        if not bool(boxes.isfinite().all()):
            raise ValueError(f'bboxes_3d has values that are not finite in row {_first_bad_row(boxes)}')
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(f'labels_3d must be in 0..{self.num_classes - 1}, got {labels.tolist()}')
        return InstanceData(labels=labels, bboxes=self.bbox_coder.encode(boxes))

    def loss_by_feat(
        self,
        all_scores: Tensor,
        all_codes: Tensor,
        proposals: Proposals,
        memory: Tensor,
        ref_windows: Tensor,
        targets: Sequence[InstanceData],
    ) -> dict[str, Tensor]:
        """Losses from predictions and coded targets.

        Args:
            all_scores: Logits ``[layers, B, Q, K]``.
            all_codes: Box codes ``[layers, B, Q, 7]``.
            proposals: The first stage's ratings.
            memory: Float ``[B, S, C]``.
            ref_windows: Float ``[1 or B, S, H, 5]``, windows of the tokens.
            targets: Labels and box codes of each point cloud, see :meth:`encode_targets`.

        Returns:
            Weighted scalars ``loss_cls``, ``loss_bbox``, ``loss_iou`` and ``loss_heading`` of the last layer, the same
            with the prefix ``d0.``, ``d1.`` ... of the layers before and ``enc_`` of the first stage.
        """
        count = all_scores.new_tensor(float(sum(len(target) for target in targets)), dtype=torch.float32)
        avg_factor = reduce_mean(count).clamp(min=1.0)
        stages = {'enc_': self._loss_of_first_stage(proposals, memory, ref_windows, targets, avg_factor)}
        last = len(all_scores) - 1
        for layer, (scores, codes) in enumerate(zip(all_scores, all_codes, strict=True)):
            prefix = '' if layer == last else f'd{layer}.'
            pairs = self.match(scores, codes, targets)
            found = torch.cat([cloud[rows] for cloud, (rows, _) in zip(codes, pairs, strict=True)])
            stages[prefix] = self._loss_of_stage(scores, found, pairs, targets, avg_factor)
        return {f'{prefix}{name}': value for prefix, losses in stages.items() for name, value in losses.items()}

    def match(self, scores: Tensor, codes: Tensor, targets: Sequence[InstanceData]) -> list[tuple[Tensor, Tensor]]:
        """Pair predictions with objects, for each point cloud by itself.

        Args:
            scores: Logits ``[B, M, K]``.
            codes: Box codes ``[B, M, 7]``.
            targets: Labels and box codes of each point cloud.

        Returns:
            Indexes of matched predictions, ascending, and of their objects.
        """
        pairs = []
        for cloud_scores, cloud_codes, target in zip(scores, codes, targets, strict=True):
            predicted = InstanceData(scores=cloud_scores, bboxes=cloud_codes)
            assigned = self.assigner.assign(predicted, target).gt_inds
            rows = (assigned > 0).nonzero().squeeze(1)
            pairs.append((rows, assigned[rows] - 1))
        return pairs

    def match_anchors(
        self, proposals: Proposals, memory: Tensor, ref_windows: Tensor, targets: Sequence[InstanceData]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair anchors with objects of any class; arguments and result as in :meth:`loss_by_feat` and :meth:`match`."""
        with torch.no_grad():
            usable = proposals.usable.unflatten(1, (-1, self.num_anchors))
            codes = self.forward_anchors(memory, ref_windows, usable).flatten(1, 2)
            return self.match(proposals.class_logits, codes, _of_one_class(targets))

    def _loss_of_first_stage(
        self,
        proposals: Proposals,
        memory: Tensor,
        ref_windows: Tensor,
        targets: Sequence[InstanceData],
        avg_factor: Tensor,
    ) -> dict[str, Tensor]:
        pairs = self.match_anchors(proposals, memory, ref_windows, targets)
        # Gradients of boxes only for matched anchors: no other anchor's box enters the loss.
        cloud = torch.cat([torch.full_like(rows, i) for i, (rows, _) in enumerate(pairs)])
        rows = torch.cat([rows for rows, _ in pairs])
        token, anchor = torch.div(rows, self.num_anchors, rounding_mode='floor'), rows % self.num_anchors
        windows = ref_windows.expand(len(memory), -1, -1, -1)[cloud, token]
        usable = proposals.usable.unflatten(1, (-1, self.num_anchors))[cloud, token]
        codes = self.forward_anchors(memory[cloud, token], windows, usable)
        found = codes.gather(1, anchor[:, None, None].expand(-1, 1, 7)).squeeze(1)
        return self._loss_of_stage(proposals.class_logits, found, pairs, _of_one_class(targets), avg_factor)

    def _loss_of_stage(
        self,
        scores: Tensor,
        found: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        targets: Sequence[InstanceData],
        avg_factor: Tensor,
    ) -> dict[str, Tensor]:
        scores = scores.to(found.dtype)  # boxes are float32 at least, whatever autocast says
        one_hot = torch.zeros_like(scores)
        for cloud, ((rows, objects), target) in enumerate(zip(pairs, targets, strict=True)):
            one_hot[cloud, rows, target.labels[objects]] = 1.0
        wanted = torch.cat([target.bboxes[objects] for (_, objects), target in zip(pairs, targets, strict=True)])
        num_classes = scores.shape[-1]
        return dict(
            loss_cls=self.loss_cls(
                scores.reshape(-1, num_classes), one_hot.view(-1, num_classes), avg_factor=avg_factor
            ),
            loss_bbox=self.loss_bbox(found[:, :6], wanted[:, :6], avg_factor=avg_factor),
            loss_iou=self.loss_iou(found, wanted, avg_factor=avg_factor),
            loss_heading=self.loss_heading(found[:, 6], wanted[:, 6], avg_factor=avg_factor),
        )

    def predict(self, hidden_states: Tensor, references: Tensor) -> list[InstanceData]:
        """Detections of each point cloud from the last layer; see :meth:`predict_by_feat`.

        Args:
            hidden_states: Float ``[layers, B, Q, C]``; only the last layer is used.
            references: Float ``[B, Q, 7]``.
        """
        scores, codes = self(hidden_states[-1:], references)
        return self.predict_by_feat(scores[0], codes[0])

    def predict_by_feat(self, scores: Tensor, codes: Tensor) -> list[InstanceData]:
        """Detections from predictions.

        Args:
            scores: Logits ``[B, Q, K]``.
            codes: Box codes ``[B, Q, 7]``.

        Returns:
            For each point cloud the best pairs of query and class, at most ``max_per_sample``, by falling score:
            ``bboxes_3d`` ``[n, 7]`` (metres, heading in -pi..pi), ``scores_3d`` ``[n]``, ``labels_3d`` ``[n]``.
        """
        flat = scores.to(codes.dtype).sigmoid().flatten(1)
        best, indexes = flat.topk(min(self.test_cfg['max_per_sample'], flat.shape[1]), dim=1)
        queries = torch.div(indexes, scores.shape[-1], rounding_mode='floor')
        boxes = self.bbox_coder.decode(codes)
        results = []
        for cloud, kept in enumerate(best >= self.test_cfg['score_thr']):
            detections = InstanceData()
            detections.bboxes_3d = boxes[cloud, queries[cloud, kept]]
            detections.scores_3d = best[cloud, kept]
            detections.labels_3d = indexes[cloud, kept] % scores.shape[-1]
            results.append(detections)
        return results


def _of_one_class(targets: Sequence[InstanceData]) -> list[InstanceData]:
    return [InstanceData(labels=torch.zeros_like(t.labels), bboxes=t.bboxes) for t in targets]


def _published_assigner() -> dict:
    return dict(
        type='boltz_mm.ReducedHungarianAssigner',
        match_costs=[
            dict(type='mmdet.FocalLossCost', alpha=0.25, gamma=2.0, eps=1e-8, weight=2.0),
            dict(type='boltz_mm.Box3dL1Cost', columns=(0, 6), weight=5.0),
            dict(type='boltz_mm.Box3dGIoUCost', weight=2.0),
            dict(type='boltz_mm.Box3dL1Cost', columns=(6, 7), weight=4.0),
        ],
    )


def _first_bad_row(values: Tensor) -> int:
    return int((~values.isfinite().all(dim=1)).nonzero()[0])
