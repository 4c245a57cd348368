"""BoxeR's attention modules, positions, encoder and decoder layers.

Our parts keep the official parameter names, so the weights of these cases load without renaming.
"""

from collections.abc import Callable

import torch
from mmdet.models.layers import MLP, inverse_sigmoid
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.models.layers.box_attention import Box3dAttention, BoxAttention, InstanceAttention
from boltz_mm.models.layers.box_position import (
    BoxPositionalEncoding,
    reference_windows_3d,
    sine_embedding,
    valid_ratios,
)
from boltz_mm.models.layers.box_transformer import (
    BoxTransformerDecoderLayer,
    BoxTransformerEncoder,
    BoxTransformerEncoderLayer,
)
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


def _load(module: nn.Module, case: Case) -> nn.Module:
    weights = case.weights()['model']
    module.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    module.load_state_dict(weights)
    return module.train(case.meta.get('mode') == 'train')


def _ratios(ratios: Tensor | None) -> Tensor | None:
    """Official ``[B, 1, 1, L, 1, 2]`` to ours, ``[B, L, 2]``."""
    return None if ratios is None else ratios[:, 0, 0, :, 0]


def _leaves(case: Case, *names: str) -> dict[str, Tensor]:
    return {name: case.inputs[name].clone().requires_grad_() for name in names}


def _gradients(leaves: dict[str, Tensor], module: nn.Module) -> Produced:
    found = {f'grad.{name}': leaf.grad for name, leaf in leaves.items()}
    found |= {f'grad.param.{name}': parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _attention(case: Case, build: Callable[..., nn.Module], **kwargs: object) -> tuple[nn.Module, dict, tuple, dict]:
    size = case.kwargs
    module = build(
        embed_dims=size['d_model'],
        num_levels=len(case.inputs['v_shape']),
        num_heads=size['num_head'],
        grid_size=size['kernel_size'],
        **kwargs,
    )
    leaves = _leaves(case, 'query', 'value', 'ref_windows')
    shapes = [tuple(shape) for shape in case.inputs['v_shape'].tolist()]
    arguments = (leaves['query'], leaves['value'], shapes, leaves['ref_windows'])
    padding = {
        'key_padding_mask': case.inputs.get('v_mask'),
        'valid_ratios': _ratios(case.inputs.get('v_valid_ratios')),
    }
    return _load(module, case), leaves, arguments, padding


def _weights_and_grid(module: BoxAttention | Box3dAttention, arguments: tuple, ratios: Tensor | None) -> Produced:
    query, _, _, ref_windows = arguments
    if isinstance(module, Box3dAttention):
        boxes, angles = module.predict_rotated_boxes(query, ref_windows)
    else:
        boxes, angles = module.predict_boxes(query, ref_windows), None
    side = (module.grid_size, module.grid_size)
    return {
        'out.attn_weights': ops.box_attention_weights(module.predict_logits(query)).unflatten(-1, side),
        'out.sampled_grid': ops.box_sampling_locations(
            boxes, module.kernel_indices, valid_ratios=ratios, angles=angles
        ),
        'out.kernel_indices': module.kernel_indices,
    }


@handler('boxer', 'box_attention', 'box3d_attention')
def box_attention(case: Case) -> Produced:
    if case.kind == 'box3d_attention':
        built = _attention(case, Box3dAttention, with_rotation=case.kwargs['with_rotation'])
    else:
        built = _attention(case, BoxAttention)
    module, leaves, arguments, padding = built
    output = module(*arguments, **padding)
    output.backward(case.inputs['cotangent_output'])
    produced = _weights_and_grid(module, arguments, padding['valid_ratios'])
    return {'out.output': output} | produced | _gradients(leaves, module)


@handler('boxer', 'instance_attention')
def instance_attention(case: Case) -> Produced:
    module, leaves, arguments, padding = _attention(case, InstanceAttention)
    output, masks = module(*arguments, **padding)
    torch.autograd.backward((output, masks), (case.inputs['cotangent_output'], case.inputs['cotangent_mask_output']))
    query, _, _, ref_windows = arguments
    boxes = module.predict_boxes(query, ref_windows)
    grid = ops.box_sampling_locations(boxes, module.kernel_indices, valid_ratios=padding['valid_ratios'])
    logits = module.predict_logits(query).unflatten(-1, (2, 2))
    spatial, level = ops.instance_attention_weights(logits, module.grid_size)
    half = module.grid_size // 2
    return {
        'out.output': output,
        'out.mask_output': masks,
        'out.infer_output': module(*arguments, **padding, mask_output=False),
        'out.spatial_attn_quadrants': spatial[..., ::half, ::half],
        'out.level_attn_quadrants': level[..., ::half, ::half],
        'out.sampled_grid': grid[:, :2],
        'out.kernel_indices': module.kernel_indices,
    } | _gradients(leaves, module)


@handler('boxer', 'positional')
def positional(case: Case) -> Produced:
    shapes = [tuple(shape) for shape in case.kwargs['spatial_shapes']]
    masks = [case.inputs[f'mask{level}'] for level in range(len(shapes))]
    encoding = BoxPositionalEncoding(case.kwargs['hidden_dim'], ref_size=case.kwargs['ref_size'])
    padded = torch.cat([mask.flatten(1) for mask in masks], dim=1).unsqueeze(-1)
    produced = {}
    for suffix, windows in (
        ('', encoding.reference_windows(shapes, masks)),
        ('_nomask', encoding.reference_windows(shapes)),
    ):
        by_name = {
            'pos_box': encoding(windows),
            'pos_fixed': sine_embedding(windows[..., :2], encoding.embed_dims),
            'ref_windows': windows,
        }
        if not suffix:  # values at padded tokens mean nothing and are stored as 0
            by_name = {name: value.masked_fill(padded, 0.0) for name, value in by_name.items()}
        produced[f'out.ref_windows{suffix}'] = by_name.pop('ref_windows')
        for name, tokens in by_name.items():
            levels = tokens.split([height * width for height, width in shapes], dim=1)
            for index, (level, shape) in enumerate(zip(levels, shapes, strict=True)):
                produced[f'out.{name}{index}{suffix}'] = level.transpose(1, 2).unflatten(-1, shape)
    ratios = valid_ratios(masks)
    return produced | {
        'out.valid_ratios': ratios[:, None, None, :, None],
        'out.proposal_pos': encoding(case.inputs['boxes']),
        'out.inverse_sigmoid': inverse_sigmoid(case.inputs['x']),
        'out.ref_windows3d': reference_windows_3d(shapes[-1:], ref_size=case.kwargs['ref_size']),
    }


def _layer_size(case: Case) -> dict[str, int]:
    size = case.kwargs
    return {
        'embed_dims': size['d_model'],
        'num_heads': size['nhead'],
        'num_levels': len(size['spatial_shapes']),
        'feedforward_channels': size['dim_feedforward'],
    }


@handler('boxer', 'encoder_layer')
def encoder_layer(case: Case) -> Produced:
    layer = _load(BoxTransformerEncoderLayer(**_layer_size(case)), case)
    leaves = _leaves(case, 'src', 'pos')
    mask = case.inputs.get('src_mask')
    output = layer(
        leaves['src'],
        leaves['pos'],
        [tuple(shape) for shape in case.inputs['src_shape'].tolist()],
        case.inputs['ref_windows'],
        mask,
        _ratios(case.inputs.get('src_valid_ratios')),
    )
    output.backward(case.inputs['cotangent_output'])
    produced = {'out.output': output} | _gradients(leaves, layer)
    if mask is not None:
        for name in ('out.output', 'grad.src', 'grad.pos'):
            produced[name] = produced[name].masked_fill(mask.unsqueeze(-1), 0.0)
    return produced


@handler('boxer', 'decoder_layer')
def decoder_layer(case: Case) -> Produced:
    options = {'with_mask': case.kwargs['use_mask'], 'residual_mode': case.kwargs['residual_mode']}
    layer = _load(BoxTransformerDecoderLayer(**_layer_size(case), **options), case)
    leaves = _leaves(case, 'tgt', 'query_pos', 'memory')
    output, state = layer(
        leaves['tgt'],
        leaves['query_pos'],
        leaves['memory'],
        [tuple(shape) for shape in case.inputs['memory_shape'].tolist()],
        case.inputs['ref_windows'],
        case.inputs.get('memory_mask'),
        _ratios(case.inputs.get('memory_valid_ratios')),
    )
    produced = {'out.output': output, 'out.infer_output': output}
    outputs, cotangents = [output], [case.inputs['cotangent_output']]
    if state is not None:
        batch, queries = output.shape[:2]
        roi = layer.forward_roi(state, [torch.arange(queries)] * batch).unflatten(0, (batch, queries))
        produced['out.roi'] = roi
        outputs.append(roi)
        cotangents.append(case.inputs['cotangent_roi'])
    torch.autograd.backward(outputs, cotangents)
    return produced | _gradients(leaves, layer)


class _FirstStage(nn.Module):
    """Encoder without layers and the branches that rate its tokens, under the official names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = BoxTransformerEncoder(0, {'embed_dims': channels})
        self.enc_detector = nn.ModuleDict(
            {'class_embed': nn.Linear(channels, 1), 'bbox_embed': MLP(channels, channels, 4, 3)}
        )


@handler('boxer', 'encoder_proposals')
def encoder_proposals(case: Case) -> Produced:
    model = _load(_FirstStage(case.kwargs['d_model']), case)
    leaves = _leaves(case, 'memory')
    proposals = model.encoder.select_proposals(
        leaves['memory'],
        case.inputs['ref_windows'],
        case.inputs.get('src_mask'),
        model.enc_detector['class_embed'],
        model.enc_detector['bbox_embed'],
        case.kwargs['num_queries'],
    )
    # The order of the queries is free: bring ours into the stored one.
    matches = proposals.topk_indexes[:, None, :] == case.stored['out.indexes'][:, :, None]
    order = matches.int().argmax(-1)
    aligned = {
        name: value.gather(1, order.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
        for name, value in (
            ('out.embed', proposals.target),
            ('out.ref_windows', proposals.ref_windows),
            ('out.pos', proposals.query_pos),
        )
    }
    aligned['out.embed'].backward(case.inputs['cotangent_embed'])
    # The choice and the windows are detached: what embeds and nothing else gets a gradient.
    zeros = {f'grad.param.{name}': torch.zeros_like(p) for name, p in model.named_parameters()}
    zeros['grad.memory'] = torch.zeros_like(leaves['memory'])
    return (
        aligned
        | {
            'out.indexes': proposals.topk_indexes.gather(1, order),
            'out.logits': proposals.class_logits.squeeze(-1),
            'out.valid': proposals.usable,
        }
        | zeros
        | _gradients(leaves, model)
    )
