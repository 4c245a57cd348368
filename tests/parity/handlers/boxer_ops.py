"""BoxeR's two operators at given points, held through :func:`boltz_mm.ops.deform_attention`.

``instance_attn`` is two calls: one with the spatial weights, and one with the grid points moved into the query axis
and the level weights.
"""

import torch

from boltz_mm.ops import deform_attention
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


@handler('boxer', 'op_box_attn')
def op_box_attn(case: Case) -> Produced:
    inputs = case.inputs
    leaves = {name: inputs[name].requires_grad_() for name in ('value', 'sampling_locations', 'attention_weights')}
    output = deform_attention(
        leaves['value'],
        inputs['spatial_shapes'],
        leaves['sampling_locations'],
        leaves['attention_weights'].flatten(4),
    )
    grads = torch.autograd.grad((output * inputs['cotangent_output']).sum(), list(leaves.values()))
    return {'out.output': output} | {f'grad.{name}': grad for name, grad in zip(leaves, grads, strict=True)}


@handler('boxer', 'op_instance_attn')
def op_instance_attn(case: Case) -> Produced:
    inputs = case.inputs
    names = [name for name in inputs if name not in ('spatial_shapes', 'level_start_index') and 'cotangent' not in name]
    value, shapes = inputs['value'], inputs['spatial_shapes']
    locations = inputs['sampling_locations']
    spatial, level = inputs['spatial_attention_weights'], inputs['level_attention_weights']
    for name in names:
        inputs[name].requires_grad_()
    batch, queries, heads, levels = locations.shape[:4]
    size = level.shape[-1]
    output = deform_attention(value, shapes, locations, spatial.flatten(4))
    each_point = deform_attention(
        value,
        shapes,
        locations.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, levels, 1, 2),
        level.flatten(4).permute(0, 1, 4, 2, 3).reshape(batch, -1, heads, levels, 1),
    )
    mask_output = each_point.view(batch, queries, size, size, -1)
    loss = (output * inputs['cotangent_output']).sum() + (mask_output * inputs['cotangent_mask_output']).sum()
    grads = torch.autograd.grad(loss, [inputs[name] for name in names])
    return {'out.output': output, 'out.mask_output': mask_output} | {
        f'grad.{name}': grad for name, grad in zip(names, grads, strict=True)
    }
