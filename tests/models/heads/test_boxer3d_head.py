"""Losses of BoxeR-3D against their formulas, detections, targets, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement, InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from boltz_mm.models.heads.boxer3d_head import BoxeR3DHead
from boltz_mm.models.layers.box3d_transformer import Box3dTransformerEncoder
from boltz_mm.models.layers.box_transformer import Proposals
from boltz_mm.models.task_modules.box3d_overlaps import giou_3d

WIDTH, CLASSES = 16, 4
SHAPES = [(4, 5), (2, 3)]


def _head(**kwargs: object) -> BoxeR3DHead:
    torch.manual_seed(0)
    return BoxeR3DHead(num_classes=CLASSES, embed_dims=WIDTH, **kwargs)


def _first_stage(head: BoxeR3DHead, batch: int) -> tuple[Proposals, Tensor, Tensor]:
    encoder = Box3dTransformerEncoder(num_layers=1, layer_cfg=dict(embed_dims=WIDTH, feedforward_channels=8))
    memory = torch.rand(batch, 26, WIDTH, requires_grad=True)
    windows = encoder.reference_windows(SHAPES)
    proposals = encoder.select_proposals(memory, windows, head.enc_cls_branch, head.enc_reg_branch, 6)
    return proposals, memory, windows


def _targets(*counts: int) -> list[InstanceData]:
    return [InstanceData(labels=torch.randint(CLASSES, (n,)), bboxes=torch.rand(n, 7)) for n in counts]


def _predictions(batch: int, queries: int = 6, layers: int = 3) -> tuple[Tensor, Tensor]:
    scores = torch.randn(layers, batch, queries, CLASSES, requires_grad=True)
    return scores, torch.rand(layers, batch, queries, 7, requires_grad=True)


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    agreement = p * target + (1 - p) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction='none') * (1 - agreement) ** 2


def _losses_by_hand(scores: Tensor, codes: Tensor, targets: list[InstanceData], count: float) -> dict[str, Tensor]:
    """Losses of one stage over all pairs, with the costs written out."""
    one_hot, size, overlap, heading = torch.zeros_like(scores), 0.0, 0.0, 0.0
    for image, target in enumerate(targets):
        p = scores[image].sigmoid()
        positive, negative = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log(), 0.75 * p**2 * -(1 - p + 1e-8).log()
        difference = (codes[image][:, None] - target.bboxes).abs()
        giou = giou_3d(codes[image][:, None], target.bboxes)
        cost = 2 * (positive - negative)[:, target.labels] + 5 * difference[..., :6].sum(-1)
        cost = cost - 2 * giou + 4 * difference[..., 6]
        for query, obj in zip(*linear_sum_assignment(cost.detach().numpy()), strict=True):
            one_hot[image, query, target.labels[obj]] = 1
            size = size + difference[query, obj, :6].sum()
            heading = heading + difference[query, obj, 6]
            overlap = overlap + 1 - giou[query, obj]
    return dict(
        loss_cls=2 * _focal(scores, one_hot).sum() / count,
        loss_bbox=torch.as_tensor(5 * size / count),
        loss_iou=torch.as_tensor(2 * overlap / count),
        loss_heading=torch.as_tensor(4 * heading / count),
    )


@pytest.mark.parametrize('counts', [(3, 2), (0, 4), (0, 0), (9, 1)])
def test_losses_and_gradients_are_those_of_the_formulas(counts: tuple[int, int]) -> None:
    head, targets = _head(), _targets(*counts)
    proposals, memory, windows = _first_stage(head, 2)
    scores, codes = _predictions(2)
    losses = head.loss_by_feat(scores, codes, proposals, memory, windows, targets)
    leaves = (scores, codes, memory, *head.enc_cls_branch.parameters(), *head.enc_reg_branch.parameters())
    found = torch.autograd.grad(sum(losses.values()), leaves, retain_graph=True)

    count = max(sum(counts), 1)
    wanted = {}
    for prefix, layer in (('d0.', 0), ('d1.', 1), ('', 2)):
        by_hand = _losses_by_hand(scores[layer], codes[layer], targets, count)
        wanted |= {f'{prefix}{name}': value for name, value in by_hand.items()}
    everywhere = torch.ones(2, 26, 3, dtype=torch.bool)
    anchors = head.forward_anchors(memory, windows, everywhere).flatten(1, 2)
    single = [InstanceData(labels=t.labels * 0, bboxes=t.bboxes) for t in targets]
    by_hand = _losses_by_hand(proposals.class_logits, anchors, single, count)
    wanted |= {f'enc_{name}': value for name, value in by_hand.items()}

    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')
    by_hand = torch.autograd.grad(sum(wanted.values()), leaves, allow_unused=True)
    for ours, theirs in zip(found, by_hand, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-3, atol=1e-5)


def test_anchors_that_are_not_usable_give_boxes_of_zeros() -> None:
    head = _head()
    usable = torch.tensor([[True, False, True]])
    codes = head.forward_anchors(torch.rand(1, WIDTH), torch.rand(1, 8, 5), usable)
    assert codes.shape == (1, 3, 7)
    assert not codes[0, 1].any()
    assert codes[0, [0, 2]].min() > 0


def test_boxes_start_at_their_references() -> None:
    head = _head()
    head.init_weights()
    references = torch.rand(2, 6, 7) * 0.8 + 0.1
    scores, codes = head(torch.rand(3, 2, 6, WIDTH), references)
    x, y, w, h, angle, z, height = references.unbind(-1)
    torch.testing.assert_close(codes, torch.stack([x, y, z, w, h, height, angle], -1).expand(3, -1, -1, -1))
    torch.testing.assert_close(head.cls_branch.bias.sigmoid(), torch.full((CLASSES,), 0.01))
    torch.testing.assert_close(head.enc_cls_branch.bias.sigmoid(), torch.full((3,), 0.01))
    assert scores.shape == (3, 2, 6, CLASSES)


def test_detections() -> None:
    head = _head(test_cfg=dict(max_per_sample=5))
    scores, codes = torch.randn(2, 6, CLASSES), torch.rand(2, 6, 7)
    results = head.predict_by_feat(scores, codes)
    for image, result in enumerate(results):
        order = scores[image].flatten().sort(descending=True).indices[:5]
        torch.testing.assert_close(result.scores_3d, scores[image].flatten()[order].sigmoid())
        assert result.labels_3d.tolist() == (order % CLASSES).tolist()
        code = codes[image, order // CLASSES]
        x, heading = code[:, 0] * 150 - 75, code[:, 6] * 2 * math.pi - math.pi
        torch.testing.assert_close(result.bboxes_3d[:, 0], x)
        torch.testing.assert_close(result.bboxes_3d[:, 6], heading)
        torch.testing.assert_close(result.bboxes_3d[:, 3:6], code[:, 3:6] * torch.tensor([150.0, 150.0, 8.0]))


def test_detections_are_at_most_all_pairs_and_above_the_threshold() -> None:
    scores, codes = torch.randn(1, 6, CLASSES), torch.rand(1, 6, 7)
    assert len(_head().predict_by_feat(scores, codes)[0]) == 6 * CLASSES
    assert len(_head().predict_by_feat(torch.randn(1, 60, CLASSES), torch.rand(1, 60, 7))[0]) == 125
    above = _head(test_cfg=dict(score_thr=0.5)).predict_by_feat(scores, codes)[0]
    assert len(above) == int((scores > 0).sum())


def _sample(boxes: object, labels: object) -> BaseDataElement:
    sample = BaseDataElement()
    sample.gt_instances_3d = InstanceData()
    sample.gt_instances_3d.set_field(boxes, 'bboxes_3d', dtype=None)
    sample.gt_instances_3d.set_field(labels, 'labels_3d', dtype=None)
    return sample


def test_targets() -> None:
    boxes = torch.tensor([[0.0, 75.0, 1.0, 15.0, 1.5, 4.0, 3 * math.pi / 2]])
    target = _head().encode_targets(_sample(boxes, torch.tensor([3])), torch.device('cpu'))
    torch.testing.assert_close(target.bboxes, torch.tensor([[0.5, 1.0, 0.5, 0.1, 0.01, 0.5, 0.25]]))
    assert target.labels.tolist() == [3]
    none = _head().encode_targets(_sample(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)), torch.device('cpu'))
    assert len(none) == 0


@pytest.mark.parametrize(
    ('boxes', 'labels', 'message'),
    [
        (torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), r'\[2, 6\] and \[2\]'),
        (torch.zeros(2, 7), torch.zeros(2, 1, dtype=torch.long), r'\[2, 7\] and \[2, 1\]'),
        (torch.tensor([[0.0] * 7, [math.nan] * 7]), torch.zeros(2, dtype=torch.long), 'not finite in row 1'),
        (torch.zeros(2, 7), torch.tensor([0, 4]), r'0\.\.3, got \[0, 4\]'),
        (torch.zeros(1, 7), torch.tensor([-1]), r'0\.\.3, got \[-1\]'),
    ],
)
def test_bad_targets_are_named(boxes: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _head().encode_targets(_sample(boxes, labels), torch.device('cpu'))


def test_predictions_that_are_not_finite_are_named() -> None:
    head = _head()
    proposals, memory, windows = _first_stage(head, 1)
    scores, codes = _predictions(1)
    with torch.no_grad():
        codes[1, 0, 2, 3] = math.nan
    with pytest.raises(FloatingPointError, match='NaN'):
        head.loss_by_feat(scores, codes, proposals, memory, windows, _targets(2))
