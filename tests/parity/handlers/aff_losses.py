"""AutoFocusFormer's set loss, matching and post-processing."""

from collections.abc import Iterator

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from boltz_mm.models.heads.point_fusion_head import instance_inference, panoptic_inference, semantic_inference
from boltz_mm.models.losses.point_sampled_set_loss import (
    OFFICIAL_ASSIGNER,
    OFFICIAL_LOSS_DICE,
    OFFICIAL_LOSS_MASK,
    Match,
    PointSampledSetLoss,
    official_loss_cls,
)
from tests.parity.case import Case, Produced
from tests.parity.registry import handler

OFFICIAL_NAMES = {'loss_cls': 'loss_ce', 'loss_mask': 'loss_mask', 'loss_dice': 'loss_dice'}


def replay(loss: PointSampledSetLoss, case: Case) -> Iterator[Tensor]:
    """Let the loss draw what the official run drew; the iterator is empty when all was drawn."""
    draws = iter([case.rand[name] for name in sorted(case.rand)])

    def rand(size: tuple[int, ...], device: torch.device) -> Tensor:
        drawn = next(draws)
        assert tuple(drawn.shape) == tuple(size), f'asked for {tuple(size)}, stored {tuple(drawn.shape)}'
        return drawn.to(device)

    loss.rand = rand
    return draws


def record_matches(loss: PointSampledSetLoss) -> list[list[Match]]:
    """The matches of each prediction, in the order in which the loss evaluates them."""
    found, match = [], loss.match

    def recording(*args) -> list[Match]:
        found.append(match(*args))
        return found[-1]

    loss.match = recording
    return found


def named_matches(found: list[list[Match]]) -> Produced:
    last = len(found) - 1
    return {
        f'out.match{i}_img{image}': torch.stack(pair)
        for i, matches in zip((last, *range(last)), found, strict=True)
        for image, pair in enumerate(matches)
    }


def weighted(config: dict, weight: float) -> dict:
    return {**config, 'loss_weight': weight}


def assigner_with(*weights: float) -> dict:
    costs = zip(OFFICIAL_ASSIGNER['match_costs'], weights, strict=True)
    return {**OFFICIAL_ASSIGNER, 'match_costs': [{**cost, 'weight': weight} for cost, weight in costs]}


def read_targets(case: Case) -> list[InstanceData]:
    inputs, targets = case.inputs, []
    while f'target_labels{len(targets)}' in inputs:
        i = len(targets)
        targets.append(InstanceData(labels=inputs[f'target_labels{i}'], masks=inputs[f'target_masks{i}'].bool()))
    return targets


@handler('aff', 'criterion')
def run_criterion(case: Case) -> Produced:
    kwargs = case.kwargs
    classes, masks = [], []
    while f'pred_logits{len(classes)}' in case.inputs:
        i = len(classes)
        classes.append(case.inputs[f'pred_logits{i}'].clone().requires_grad_())
        masks.append(case.inputs[f'pred_masks{i}'].clone().requires_grad_())
    weights = [kwargs[name] for name in ('class_weight', 'mask_weight', 'dice_weight')]
    loss_cls = weighted(official_loss_cls(kwargs['num_classes']), weights[0])
    loss_cls['class_weight'][-1] = kwargs['eos_coef']
    loss = PointSampledSetLoss(
        kwargs['num_classes'],
        loss_cls,
        weighted(OFFICIAL_LOSS_MASK, weights[1]),
        weighted(OFFICIAL_LOSS_DICE, weights[2]),
        assigner_with(*weights),
        kwargs['num_points'],
        kwargs['oversample_ratio'],
        kwargs['importance_sample_ratio'],
    )
    draws, found = replay(loss, case), record_matches(loss)
    losses = loss(classes, masks, read_targets(case))
    assert next(draws, None) is None, 'the official run drew more numbers'
    total = sum(losses.values())
    total.backward()
    produced = {'out.total': total} | named_matches(found)
    last = len(classes) - 1
    for i in range(last + 1):
        prefix = '' if i == last else f'd{i}.'
        for (ours, official), weight in zip(OFFICIAL_NAMES.items(), weights, strict=True):
            produced[f'out.{official}{i}'] = losses[prefix + ours] / weight
        produced[f'grad.pred_logits{i}'] = classes[i].grad
        produced[f'grad.pred_masks{i}'] = masks[i].grad
    return produced


@handler('aff', 'matcher_cost')
def run_matcher_cost(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, case.inputs
    classes, logits = inputs['pred_logits'], inputs['pred_masks']
    assigner = assigner_with(kwargs['cost_class'], kwargs['cost_mask'], kwargs['cost_dice'])
    loss = PointSampledSetLoss(classes.shape[-1] - 1, assigner=assigner, num_points=kwargs['num_points'])
    replay(loss, case)
    labels, masks = inputs['target_labels'], inputs['target_masks'].to(logits.dtype)
    cost = loss.cost(classes[0], logits[0], labels, masks)
    replay(loss, case)
    [match] = loss.match(classes, logits, [labels], [masks])
    return {'out.cost': cost, 'out.match': torch.stack(match)}


@handler('aff', 'inference_tasks')
def run_inference_tasks(case: Case) -> Produced:
    kwargs, (classes, masks) = case.kwargs, (case.inputs['mask_cls'], case.inputs['mask_pred'])
    things, limit = kwargs['thing_classes'], kwargs['test_topk_per_image']
    panoptic, segments = panoptic_inference(
        classes, masks, things, kwargs['object_mask_threshold'], kwargs['overlap_threshold']
    )
    expected = case.meta.get('segments_info')
    assert expected is None or [s._asdict() for s in segments] == expected
    produced = {'out.semantic': semantic_inference(classes, masks), 'out.panoptic_seg': panoptic}
    for name, found in (
        ('instance', instance_inference(classes, masks, limit)),
        ('instance_thing_only', instance_inference(classes, masks, limit, things)),
    ):
        produced |= {
            f'out.{name}_masks': found.masks,
            f'out.{name}_scores': found.scores,
            f'out.{name}_classes': found.labels,
        }
    return produced
