"""BoxeR-3D as a whole: points to pillars, maps, boxes, losses, matching, gradients."""

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from boltz_mm.converters.boxer3d import convert_boxer3d, our_key
from boltz_mm.models.detectors.boxer3d import BoxeR3D, TransformerOutput
from tests.parity.case import Case, Produced
from tests.parity.registry import handler

# Official loss names to ours, with the weight that ours includes.
_LOSSES = {'loss_ce': ('loss_cls', 2), 'loss_bbox': ('loss_bbox', 5), 'loss_giou': ('loss_iou', 2),
           'loss_rad': ('loss_heading', 4)}  # fmt: skip


def _build(case: Case) -> BoxeR3D:
    size = case.kwargs
    width = size['hidden_dim']
    layer = dict(embed_dims=width, feedforward_channels=size['dim_feedforward'])
    model = BoxeR3D(
        backbone=dict(
            type='boltz_mm.PillarNet',
            in_channels=case.inputs['points0'].shape[1],
            voxel_size=size['voxel_size'],
            point_cloud_range=size['pc_range'],
            max_points=size['max_points'],
            max_voxels=size['max_voxels'],
            filter_range=False,  # the case starts at the grouping of points
            feat_channels=size['pfn_filters'],
            stage_layers=size['neck_layers'],
            stage_channels=size['neck_filters'],
            stage_strides=[1] + [2] * (len(size['neck_layers']) - 1),
            out_indices=range(len(size['neck_layers']))[-2:],
        ),
        neck=dict(type='boltz_mm.BoxeRNeck', in_channels=size['neck_filters'][-2:], out_channels=width),
        encoder=dict(type='boltz_mm.Box3dTransformerEncoder', num_layers=size['enc_layers'], layer_cfg=layer),
        decoder=dict(type='boltz_mm.Box3dTransformerDecoder', num_layers=size['dec_layers'], layer_cfg=layer),
        bbox_head=dict(
            type='boltz_mm.BoxeR3DHead',
            num_classes=size['num_classes'],
            embed_dims=width,
            bbox_coder=dict(type='boltz_mm.Box3dCoder', point_cloud_range=size['pc_range']),
        ),
        num_queries=size['num_queries'],
    )
    weights, report = convert_boxer3d(case.weights(), model)
    if not report.complete:
        raise ValueError(str(report))
    model.load_state_dict(weights)
    return model.train(case.meta.get('mode') == 'train')


def _alignment(ours: Tensor, stored: Tensor) -> Tensor:
    """For each image the positions ``[B, Q]`` in ``ours`` of the stored indexes; any order if the sets differ."""
    order = ours.argsort(dim=1)
    found = torch.searchsorted(ours.gather(1, order), stored).clamp(max=ours.shape[1] - 1)
    return order.gather(1, found)


def _pairs(pairs: list[tuple[Tensor, Tensor]], positions: Tensor | None) -> list[Tensor]:
    aligned = []
    for image, (rows, objects) in enumerate(pairs):
        if positions is not None:
            rows = positions[image].argsort()[rows]
        order = rows.argsort()
        aligned.append(torch.stack([rows[order], objects[order]]))
    return aligned


def _backbone_outputs(model: BoxeR3D, points: list[Tensor]) -> Produced:
    net = model.backbone
    pillars = net.voxelize(points)
    features = net.reader(pillars)
    return {
        'out.grid_shape': torch.tensor(net.grid_shape),
        'out.voxels': pillars.voxels,
        'out.coordinates': pillars.coordinates,
        'out.num_points_per_voxel': pillars.num_points,
        'out.pillar_features': features,
        'out.canvas_sum': net.scatter(features, pillars.coordinates, len(points)).sum(1),
    }


def _matching(
    model: BoxeR3D, out: TransformerOutput, scores: Tensor, codes: Tensor, targets: list, positions: Tensor
) -> Produced:
    head = model.bbox_head
    matches = {'enc0': _pairs(head.match_anchors(out.proposals, out.memory, out.ref_windows, targets), None)}
    for layer in range(len(scores)):
        name = 'last' if layer == len(scores) - 1 else f'aux{layer}'
        matches[name] = _pairs(head.match(scores[layer], codes[layer], targets), positions)
    return {f'out.match.{name}.{image}': pair for name, images in matches.items() for image, pair in enumerate(images)}


def _unweighted(losses: dict[str, Tensor], layers: int) -> Produced:
    stages = {'': '', 'enc_': '_enc_0'} | {f'd{layer}.': f'_{layer}' for layer in range(layers - 1)}
    return {
        f'out.loss.{official}{suffix}': losses[f'{prefix}{name}'] / weight
        for prefix, suffix in stages.items()
        for official, (name, weight) in _LOSSES.items()
    }


def _gradients(model: BoxeR3D, names: list[str]) -> Produced:
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[our_key(name)].grad for name in names}
    norms = torch.stack([gradient.norm() for gradient in gradients.values()])
    return {'grad.norm': norms} | {f'grad.param.{name}': gradient for name, gradient in gradients.items()}


@handler('boxer', 'boxer3d')
def boxer3d(case: Case) -> Produced:
    model = _build(case)
    count = sum(name.startswith('points') for name in case.inputs)
    points = [case.inputs[f'points{i}'] for i in range(count)]
    targets = [
        InstanceData(labels=case.inputs[f'target{i}.labels'], bboxes=case.inputs[f'target{i}.boxes'])
        for i in range(count)
    ]
    produced = _backbone_outputs(model, points)

    out = model.forward_transformer(model.extract_feat(points))
    head, proposals = model.bbox_head, out.proposals
    scores, codes = head(out.hidden_states, proposals.ref_windows)
    losses = head.loss_by_feat(scores, codes, proposals, out.memory, out.ref_windows, targets)
    total = sum(losses.values())
    total.backward()

    positions = _alignment(proposals.topk_indexes, case.stored['out.topk_indexes'])

    def align(x: Tensor) -> Tensor:  # [..., B, Q, n]
        return x.gather(-2, positions.unsqueeze(-1).expand(x.shape))

    usable = proposals.usable.unflatten(1, (-1, head.num_anchors))
    produced |= {
        'out.memory': out.memory,
        'out.topk_indexes': proposals.topk_indexes.gather(1, positions),
        'out.dec_ref_windows': align(proposals.ref_windows),
        'out.hs': align(out.hidden_states),
        'out.enc0.pred_logits': proposals.class_logits,
        'out.enc0.pred_boxes': head.forward_anchors(out.memory, out.ref_windows, usable).flatten(1, 2),
        'out.loss.total': total,
    }
    for layer, name in enumerate([*(f'aux{i}.' for i in range(len(scores) - 1)), '']):
        produced |= {f'out.{name}pred_logits': align(scores[layer]), f'out.{name}pred_boxes': align(codes[layer])}
    produced |= _matching(model, out, scores, codes, targets, positions)
    return produced | _unweighted(losses, len(scores)) | _gradients(model, case.kwargs['_params'])
