"""AutoFocusFormer's sampling between points: MSDETRPC, inverse-distance interpolation, points to images."""

import torch

from boltz_mm.ops import (
    inverse_distance_interpolate,
    inverse_distance_weights,
    knn_points,
    points_to_image,
    weighted_point_sampling,
)
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


@handler('aff', 'op_msdetrpc')
def op_msdetrpc(case: Case) -> Produced:
    inputs = case.inputs
    leaves = {name: inputs[name].requires_grad_() for name in ('nn_weight', 'attn', 'value')}
    output = weighted_point_sampling(inputs['nn_idx'], *leaves.values())
    grads = torch.autograd.grad((output * inputs['cotangent_out']).sum(), list(leaves.values()))
    return {'out.out': output} | {f'grad.{name}': grad for name, grad in zip(leaves, grads, strict=True)}


@handler('aff', 'shepard')
def shepard(case: Case) -> Produced:
    inputs = case.inputs
    leaves = {name: inputs[name].requires_grad_() for name in ('feature', 'query', 'power')}
    feature, query, power = leaves.values()
    database = inputs['database']
    index = knn_points(query.detach(), database, case.kwargs['k'])
    neighbours = torch.stack([points[rows] for points, rows in zip(database, index, strict=True)])
    exponent = power if case.kwargs['learnable'] else case.kwargs['power']
    output = inverse_distance_interpolate(feature, database, query, index, exponent)
    wanted = [name for name in leaves if f'grad.{name}' in case.names_to_hold()]
    grads = torch.autograd.grad((output * inputs['cotangent_out']).sum(), [leaves[name] for name in wanted])
    produced = {'out.idx': index, 'out.weights': inverse_distance_weights(query, neighbours, exponent)}
    return produced | {'out.out': output} | {f'grad.{name}': grad for name, grad in zip(wanted, grads, strict=True)}


@handler('aff', 'point2img')
def point2img(case: Case) -> Produced:
    inputs = case.inputs
    canvas = case.kwargs['h'], case.kwargs['w']
    return {
        'out.img': points_to_image(inputs['x'].transpose(1, 2), inputs['pos'], canvas),
        'out.sparse_img': points_to_image(inputs['sparse_feat'], inputs['sparse_pos'], canvas),
    }
