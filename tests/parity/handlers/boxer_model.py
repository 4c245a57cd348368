"""BoxeR-2D: heads, criterion, mask grids, post-processing and the whole model."""

import re

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor

from boltz_mm.converters.boxer import convert_boxer, our_key
from boltz_mm.models.detectors.boxer import BoxeR, BoxeROutputs, level_masks
from boltz_mm.models.heads.boxer_head import BoxeRHead
from boltz_mm.models.layers.box_transformer import MASKED_LOGIT
from boltz_mm.models.layers.mask_grid import mask_targets, paste_mask, sample_masks
from boltz_mm.registry import MODELS
from tests.parity.case import Case, Produced
from tests.parity.registry import handler

_WEIGHTS = {'loss_ce': 2.0, 'loss_bbox': 5.0, 'loss_giou': 2.0, 'loss_mask': 5.0, 'loss_dice': 5.0}
_OFFICIAL_LOSS = {'loss_cls': 'loss_ce', 'loss_iou': 'loss_giou'}


def official_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weighted losses under the official names, unweighted, and their weighted sum ``total``."""
    official = {'total': sum(value for name, value in losses.items() if 'loss' in name)}
    for name, value in losses.items():
        match = re.fullmatch(r'(?:d(\d+)\.)?(enc_)?(loss_\w+)', name)
        if match:
            layer, enc, term = match.groups()
            term = _OFFICIAL_LOSS.get(term, term)
            suffix = '_enc_0' if enc else '' if layer is None else f'_{layer}'
            official[term + suffix] = value / _WEIGHTS[term]
    return official


def read_targets(case: Case) -> tuple[list[InstanceData], list[dict]]:
    """Ground truth in pixels, as mmdet has it, and the meta information of each image."""
    instances, metas = [], []
    for i, (height, width) in enumerate(case.kwargs['sizes']):
        given = {
            k: case.inputs[f'target{i}.{k}'] for k in ('labels', 'boxes', 'masks') if f'target{i}.{k}' in case.inputs
        }
        boxes = given.pop('boxes')
        factor = boxes.new_tensor([width, height, width, height])
        instances.append(InstanceData(bboxes=bbox_cxcywh_to_xyxy(boxes) * factor, **given))
        metas.append({'img_shape': (height, width)})
    return instances, metas


def gather(values: Tensor, rows: list[Tensor]) -> Tensor:
    return torch.cat([values[b, row] for b, row in enumerate(rows)])


def layer_name(layer: int, num_layers: int) -> str:
    return 'last' if layer == num_layers - 1 else f'aux{layer}'


@handler('boxer', 'detector')
def run_detector(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, dict(case.inputs)
    if kwargs['mask_mode'] not in ('none', 'mask_v1'):
        raise ValueError(f'no config uses mask_mode {kwargs["mask_mode"]!r}, and we do not have it')
    prefix = 'enc_detector.' if kwargs.get('with_x_mask') else 'detector.'
    head = BoxeRHead(kwargs['num_classes'], kwargs['hidden_dim'], with_mask=kwargs['mask_mode'] == 'mask_v1')
    weights = case.weights()
    official = {prefix + key: value for key, value in weights.get('model', weights).items()}
    state, report = convert_boxer(official)
    assert not report.unexpected
    head.to(inputs['x'].dtype).load_state_dict(
        {key.removeprefix('bbox_head.'): value for key, value in state.items()}, strict=False
    )
    leaves = {name: inputs[name].clone().requires_grad_() for name in ('x', 'roi') if name in inputs}
    inputs |= leaves

    if kwargs.get('with_x_mask'):
        usable = ~inputs['x_mask'][0]
        logits = head.enc_cls_branch(inputs['x']).masked_fill(~usable[..., None], MASKED_LOGIT)
        boxes = head.forward_first_stage_boxes(inputs['x'][0], inputs['ref_windows'], usable)[None]
    else:
        logits, boxes = head(inputs['x'], inputs['ref_windows'])
    layers = {'logits': list(logits), 'boxes': list(boxes)}
    if head.with_mask:
        layers['masks'] = [
            head.forward_masks(roi.flatten(0, 1), scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
            for roi, scores in zip(inputs['roi'], logits, strict=True)
        ]
    produced, total = {}, 0
    for kind, values in layers.items():
        for i, value in enumerate(values):
            middle = '' if i == len(values) - 1 else f'aux{i}.'
            produced[f'out.{middle}pred_{kind}'] = value
        total = total + (values[-1] * inputs[f'cotangent_{kind}']).sum()
    total.backward()
    produced |= {f'grad.{name}': leaf.grad for name, leaf in leaves.items()}
    parameters = dict(head.named_parameters())
    for key in weights.get('model', weights):
        parameter = parameters.get(str(our_key(prefix + key, 0)).removeprefix('bbox_head.'))
        if parameter is not None:
            produced[f'grad.param.{key}'] = parameter.grad
    return produced


def match_layers(
    head: BoxeRHead, predictions: dict[str, tuple[Tensor, Tensor]], instances: list[InstanceData], metas: list[dict]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Matches of each of several layers; the first stage (``enc*``) has one class."""
    targets = head.make_targets(instances, metas)
    single = [t._replace(labels=torch.zeros_like(t.labels)) for t in targets]
    return {
        name: head.match(logits, boxes, single if name.startswith('enc') else targets)
        for name, (logits, boxes) in predictions.items()
    }


@handler('boxer', 'criterion')
def run_criterion(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, dict(case.inputs)
    head = BoxeRHead(kwargs['num_classes'], 32, with_mask=kwargs['use_mask'])
    for name in [n for n in inputs if 'pred_' in n]:
        inputs[name] = inputs[name].clone().requires_grad_()
    prefixes = [f'aux{i}.' for i in range(kwargs['n_aux'])] + ['']
    has_enc = 'enc0.pred_logits' in inputs
    instances, metas = read_targets(case)
    losses = head.loss_by_feat(
        [inputs[f'{p}pred_logits'] for p in prefixes],
        [inputs[f'{p}pred_boxes'] for p in prefixes],
        inputs['enc0.pred_logits'] if has_enc else None,
        inputs['enc0.pred_boxes'] if has_enc else None,
        instances,
        metas,
        mask_logits=(lambda layer, rows: gather(inputs[f'{prefixes[layer]}pred_masks'], rows))
        if kwargs['use_mask']
        else None,
        num_boxes=inputs.get('num_boxes'),
    )
    official = official_losses(losses)
    official['total'].sum().backward()
    produced: Produced = {f'out.{name}': value.reshape(()) for name, value in official.items()}
    produced['out.accuracy'] = produced['out.metric.accuracy'] = losses['accuracy']
    produced |= {f'grad.{n}': v.grad for n, v in inputs.items() if 'pred_' in n}

    layers = {p.rstrip('.') or 'last': (inputs[f'{p}pred_logits'], inputs[f'{p}pred_boxes']) for p in prefixes}
    if has_enc:
        layers['enc0'] = (inputs['enc0.pred_logits'], inputs['enc0.pred_boxes'])
    targets = head.make_targets(instances, metas)
    for name, matches in match_layers(head, layers, instances, metas).items():
        for b, (preds, gts) in enumerate(matches):
            produced[f'out.match.{name}.{b}'] = torch.stack([preds, gts])
            cost = inputs['target0.boxes'].new_zeros(0)
            if len(gts) and name != 'enc0':
                scores, boxes = (value[b].detach() for value in layers[name])
                pred = InstanceData(scores=scores, bboxes=bbox_cxcywh_to_xyxy(boxes) * targets[b].factor)
                # Of the cost matrix of image b against its own objects, the cases hold row b.
                cost = head.assigner.cost(pred, instances[b], metas[b])[b]
            produced[f'out.cost.{name}.{b}'] = cost
    for b, (gt, target) in enumerate(zip(instances, targets, strict=True)):
        if 'masks' in gt:
            produced[f'out.instance_masks.{b}'] = mask_targets(gt.masks, target.boxes, 28)[..., None]
    return produced


@handler('boxer', 'mask_grid')
def run_mask_grid(case: Case) -> Produced:
    masks, boxes, size = case.inputs['masks'], case.inputs['boxes'], case.kwargs['grid']
    height, width = masks.shape[1:]
    pasted = boxes.new_zeros(len(boxes), height, width)
    for full, probs, box in zip(pasted, case.inputs['box_masks'], case.inputs['abs_boxes'], strict=True):
        values, (rows, columns) = paste_mask(probs, box, (height, width))
        full[rows, columns] = values
    return {
        'out.extracted': sample_masks(masks, boxes, size)[..., None],
        'out.instance_masks': mask_targets(masks, boxes, size)[..., None],
        'out.pasted': pasted,
    }


@handler('boxer', 'postprocess')
def run_postprocess(case: Case) -> Produced:
    kwargs, inputs, produced = case.kwargs, case.inputs, {}
    num_classes = kwargs['num_classes']
    metas = [
        {'img_shape': tuple(size), 'ori_shape': tuple(size), 'scale_factor': (1.0, 1.0)}
        for size in inputs['orig_size'].tolist()
    ]
    masks = (lambda layer, rows: gather(inputs['pred_masks'], rows)) if kwargs['use_mask'] else None
    modes = {'': {'max_per_img': 100}}
    if kwargs.get('threshold') is not None:
        modes['thr.'] = {'score_thr': kwargs['threshold']}
    for mode, test_cfg in modes.items():
        head = BoxeRHead(num_classes, 32, with_mask=kwargs['use_mask'], test_cfg=test_cfg)
        results = head.predict_by_feat(
            inputs['pred_logits'], inputs['pred_boxes'], metas, mask_logits=masks, rescale=True
        )
        for b, result in enumerate(results):
            index = result.query_inds * num_classes + result.labels
            stored = case.stored.get(f'out.{mode}{b}.index')
            # The official order is that of an unsorted top-k, or with a threshold that of the predictions.
            order = index.argsort() if stored is None else positions(index, stored)
            produced[f'out.{mode}{b}.index'] = index[order]
            produced[f'out.{mode}{b}.scores'] = result.scores[order]
            produced[f'out.{mode}{b}.labels'] = result.labels[order]
            produced[f'out.{mode}{b}.boxes'] = result.bboxes[order]
            if 'masks' in result:
                produced[f'out.{mode}{b}.masks'] = result.masks[order].to(torch.uint8)
    return produced


def positions(ours: Tensor, stored: Tensor) -> Tensor:
    """Where each stored index stands among ours; our own order if they are not the same indexes."""
    if not torch.equal(ours.sort().values, stored.sort().values):
        return torch.arange(len(ours))
    return ours.argsort()[stored.argsort().argsort()]


def boxer_config(kwargs: dict) -> dict:
    """Our config for the arguments of the official model."""
    layer = {
        'embed_dims': kwargs['hidden_dim'],
        'num_heads': kwargs['nhead'],
        'num_levels': kwargs['nlevel'],
        'feedforward_channels': kwargs['dim_feedforward'],
    }
    indices = [int(name.removeprefix('layer')) - 1 for name in kwargs['return_interm_layers']]
    base, expansion = kwargs['backbone_base_channels'], 1 if kwargs['backbone_depth'] < 50 else 4
    decoder_layer = {**layer, 'with_mask': kwargs['use_mask'], 'residual_mode': kwargs['residual_mode']}
    return {
        'type': 'boltz_mm.BoxeR',
        'num_queries': kwargs['num_queries'],
        'backbone': {
            'type': 'mmdet.ResNet',
            'depth': kwargs['backbone_depth'],
            'stem_channels': base,
            'base_channels': base,
            'out_indices': indices,
            'norm_cfg': {'type': 'BN', 'requires_grad': False},
            'norm_eval': True,
            'style': 'pytorch',
        },
        'neck': {
            'type': 'boltz_mm.BoxeRNeck',
            'in_channels': [base * expansion * 2**i for i in indices],
            'out_channels': kwargs['hidden_dim'],
            'num_outs': kwargs['nlevel'],
        },
        'positional_encoding': {'embed_dims': kwargs['hidden_dim'], 'ref_size': kwargs['ref_size']},
        'encoder': {'num_layers': kwargs['enc_layers'], 'layer_cfg': layer},
        'decoder': {'num_layers': kwargs['dec_layers'], 'layer_cfg': decoder_layer},
        'bbox_head': {
            'type': 'boltz_mm.BoxeRHead',
            'num_classes': kwargs['num_classes'],
            'embed_dims': kwargs['hidden_dim'],
            'with_mask': kwargs['use_mask'],
        },
    }


def build_model(case: Case) -> BoxeR:
    model = MODELS.build(boxer_config(case.kwargs))
    state, report = convert_boxer(case.weights(), model)
    assert report.complete, str(report)
    model.load_state_dict(state)
    return model.to(case.inputs['image'].dtype)


def data_samples(case: Case) -> list[DetDataSample]:
    instances, metas = read_targets(case)
    shape = tuple(case.inputs['image'].shape[-2:])
    return [
        DetDataSample(metainfo={**meta, 'batch_input_shape': shape}, gt_instances=gt)
        for gt, meta in zip(instances, metas, strict=True)
    ]


def query_order(case: Case, mode: str, topk_indexes: Tensor) -> Tensor:
    """``[B, Q]``: where each stored query stands among ours."""
    stored = case.stored[f'out.{mode}.topk_indexes']
    return torch.stack([positions(ours, theirs) for ours, theirs in zip(topk_indexes, stored, strict=True)])


def reorder(values: Tensor, order: Tensor) -> Tensor:
    """Queries of ``[B, Q, ...]`` in the given order ``[B, Q]``."""
    return torch.stack([value[o] for value, o in zip(values, order, strict=True)])


def name_outputs(outs: BoxeROutputs, order: Tensor, mode: str) -> Produced:
    produced: Produced = {f'out.{mode}.topk_indexes': outs.topk_indexes.gather(1, order)}
    parts = {'logits': outs.cls_scores, 'boxes': outs.bbox_preds, 'masks': outs.mask_logits}
    for kind, values in parts.items():
        for i, value in enumerate(values if values is not None else ()):
            middle = '' if i == len(values) - 1 else f'aux{i}.'
            produced[f'out.{mode}.{middle}pred_{kind}'] = reorder(value, order)
    produced[f'out.{mode}.enc0.pred_logits'] = outs.enc_cls_scores
    produced[f'out.{mode}.enc0.pred_boxes'] = outs.enc_bbox_preds
    return produced


@handler('boxer', 'boxer2d')
def run_boxer2d(case: Case) -> Produced:
    model, samples, image = build_model(case), data_samples(case), case.inputs['image']
    model.eval()
    produced: Produced = {}
    with torch.no_grad():
        features = model.backbone(image)
        levels = model.neck(features)
        shapes = [tuple(level.shape[-2:]) for level in levels]
        masks = level_masks(shapes, samples, image.device) or [
            torch.zeros(len(image), *shape, dtype=torch.bool) for shape in shapes
        ]
        produced |= {f'out.eval.c{i}': feature for i, feature in enumerate(features)}
        produced |= {f'out.eval.src{i}': level for i, level in enumerate(levels)}
        produced |= {f'out.eval.mask{i}': mask for i, mask in enumerate(masks)}

        outs = model.forward_all(image, samples)
        order = query_order(case, 'eval', outs.topk_indexes)
        produced |= name_outputs(outs, order, 'eval')
        padded = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        produced['out.eval.memory'] = outs.memory.masked_fill(padded[..., None], 0.0)
        produced['out.eval.hs'] = torch.stack([reorder(layer, order) for layer in outs.hidden_states])
        produced['out.eval.dec_ref_windows'] = reorder(outs.references, order)

        height, width = case.kwargs['sizes'][0]
        single = model.forward_all(image[:1, :, :height, :width])
        produced |= name_outputs(single, query_order(case, 'eval_single', single.topk_indexes), 'eval_single')

        predictions = dict(zip(('logits', 'boxes', 'masks'), model(image, samples), strict=False))
        order = query_order(case, 'infer', outs.topk_indexes)
        produced['out.infer.topk_indexes'] = outs.topk_indexes.gather(1, order)
        produced |= {f'out.infer.pred_{kind}': reorder(value, order) for kind, value in predictions.items()}
    return produced | train_outputs(case, model, samples)


def train_outputs(case: Case, model: BoxeR, samples: list[DetDataSample]) -> Produced:
    """Losses, matches and gradients of one training step."""
    model.train()
    losses = model.loss(case.inputs['image'], samples)
    official = official_losses(losses)
    official['total'].backward()
    produced: Produced = {f'out.loss.{name}': value for name, value in official.items()}
    produced['out.metric.accuracy'] = losses['accuracy']

    parameters = dict(model.named_parameters())
    num_projections = len(model.neck.convs)
    gradients = {name: parameters[our_key(name, num_projections)].grad for name in case.kwargs['_params']}
    produced |= {f'grad.param.{name}': gradient for name, gradient in gradients.items()}
    produced['grad.norm'] = torch.stack([gradient.norm() for gradient in gradients.values()])

    with torch.no_grad():
        outs = model.forward_all(case.inputs['image'], samples)
    order = query_order(case, 'train', outs.topk_indexes)
    produced['out.train.topk_indexes'] = outs.topk_indexes.gather(1, order)
    num_layers = len(outs.cls_scores)
    layers = {
        layer_name(i, num_layers): (reorder(outs.cls_scores[i], order), reorder(outs.bbox_preds[i], order))
        for i in range(num_layers)
    }
    layers['enc0'] = (outs.enc_cls_scores, outs.enc_bbox_preds)
    instances, metas = read_targets(case)
    for name, matches in match_layers(model.bbox_head, layers, instances, metas).items():
        produced |= {f'out.match.{name}.{b}': torch.stack(match) for b, match in enumerate(matches)}
    return produced
