"""AutoFocusFormer's head: layers, pixel decoder, transformer decoder, criterion and post-processing."""

import torch
from torch import Tensor, nn

from boltz_mm.models.heads.point_pixel_decoder import PointPixelDecoder
from boltz_mm.models.layers.point_conv import PointConv
from boltz_mm.models.layers.point_deform_attention import PointDeformAttention, PointLevels
from boltz_mm.models.layers.point_masked_decoder import PointMaskedDecoder
from boltz_mm.models.layers.point_position import PointSineEncoding
from boltz_mm.models.layers.point_tables import cell_index, grid_neighbors, token_of_cell
from boltz_mm.ops import points_to_image
from boltz_mm.structures import PointFeature
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


def canvas_of(pos: Tensor) -> tuple[int, int]:
    """Height and width of the full grid that these positions fill."""
    width, height = (pos.flatten(0, 1).amax(dim=0) + 1).int().tolist()
    return height, width


def leaves_of(case: Case, names: list[str]) -> dict[str, Tensor]:
    return {name: case.inputs[name].clone().requires_grad_() for name in names}


def load(module: nn.Module, case: Case) -> nn.Module:
    """Load a part's own weights; official and our names agree inside the parts."""
    weights = case.weights()
    module.load_state_dict(weights.get('model', weights))
    return module.to(next(iter(case.inputs.values())).dtype) if case.double else module


def gradients(module: nn.Module, leaves: dict[str, Tensor]) -> Produced:
    produced = {f'grad.{name}': leaf.grad for name, leaf in leaves.items()}
    return produced | {f'grad.param.{name}': p.grad for name, p in module.named_parameters()}


@handler('aff', 'sine_embed')
def run_sine_embed(case: Case) -> Produced:
    kwargs = case.kwargs
    encoding = PointSineEncoding(
        kwargs['num_pos_feats'], kwargs.get('temperature', 10000), normalize=kwargs.get('normalize', True)
    )
    return {'out.embed': encoding(case.inputs['pos'])}


@handler('aff', 'msdeform_attn')
def run_deform_attention(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, case.inputs
    count = kwargs['n_levels']
    attention = PointDeformAttention(
        kwargs['d_model'],
        count,
        kwargs['n_heads'],
        kwargs['n_points'],
        kwargs['shepard_power'],
        kwargs['shepard_power_learnable'],
    )
    load(attention, case)
    leaves = leaves_of(case, [f'{name}{level}' for name in ('query', 'value') for level in range(count)])
    positions = [inputs[f'pos{level}'] for level in range(count)]
    sizes = [p.shape[1] for p in positions]
    tables = torch.stack([inputs[f'nb_idx{level}'] for level in range(count)], dim=1)
    levels = PointLevels(torch.cat(positions, dim=1), sizes, tables, tuple(inputs['spatial_shape'].tolist()))
    query, value = (torch.cat([leaves[f'{name}{i}'] for i in range(count)], dim=1) for name in ('query', 'value'))
    outs = attention(query, value, levels).split(sizes, dim=1)
    sum((out * inputs[f'cotangent_out{i}']).sum() for i, out in enumerate(outs)).backward()
    return {f'out.out{i}': out for i, out in enumerate(outs)} | gradients(attention, leaves)


@handler('aff', 'point_conv')
def run_point_conv(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, case.inputs
    conv = load(PointConv(kwargs['dim'], kwargs['out_dim'], bias=kwargs['bias']), case)
    leaves = leaves_of(case, ['feat'])
    canvas = canvas_of(inputs['pos'])
    tokens = token_of_cell(inputs['pos'], canvas)
    rows = torch.arange(len(tokens))[:, None, None]
    near = tokens[rows, grid_neighbors(tokens, canvas, ordered=True)]  # tokens near each cell
    index = near[rows[..., 0], cell_index(inputs['pos'], canvas)]  # tokens near each token
    out = conv(leaves['feat'], inputs['pos'], index)
    (out * inputs['cotangent_out']).sum().backward()
    return {'out.nn_idx': index, 'out.out': out} | gradients(conv, leaves)


@handler('aff', 'pixel_decoder')
def run_pixel_decoder(case: Case) -> Produced:
    inputs = case.inputs
    decoder = load(build_pixel_decoder(case.kwargs), case)
    names = [f'res{i}' for i in range(2, 2 + len(case.kwargs['in_channels']))]
    leaves = leaves_of(case, names)
    canvas = tuple(inputs['spatial_shape'].tolist())
    levels = [PointFeature(leaves[name], inputs[f'{name}_pos'], canvas) for name in names]
    mask_features, memory, canvas = decoder(levels)
    # Ours are in the order of the cells, the official ones in that of the tokens.
    cells = cell_index(levels[0].pos, canvas)
    at_tokens = mask_features[torch.arange(len(cells))[:, None], cells]
    produced = {'out.mask_features': at_tokens, 'out.mask_features_pos': levels[0].pos}
    produced |= {f'out.multi_scale{i}': level.feat for i, level in enumerate(memory)}
    total = (at_tokens * inputs['cotangent_mask_features']).sum()
    for i, level in enumerate(memory):
        total = total + (level.feat * inputs[f'cotangent_multi_scale{i}']).sum()
    total.backward()
    return produced | gradients(decoder, leaves)


def build_pixel_decoder(kwargs: dict, in_channels: list[int] | None = None) -> PointPixelDecoder:
    in_channels = in_channels or kwargs['in_channels']
    if kwargs.get('common_stride', 4) != 4:
        raise ValueError('the finest level of AFF has stride 4')
    return PointPixelDecoder(
        in_channels,
        feat_channels=kwargs['conv_dim'],
        out_channels=kwargs['mask_dim'],
        num_heads=kwargs['transformer_nheads'],
        num_layers=kwargs['transformer_enc_layers'],
        feedforward_channels=kwargs['transformer_dim_feedforward'],
        power=kwargs['shepard_power'],
        learnable_power=kwargs['shepard_power_learnable'],
    )


def decoder_settings(kwargs: dict) -> dict:
    """Settings of our transformer decoder for the official keyword arguments."""
    return {
        'embed_dims': kwargs['hidden_dim'],
        'out_channels': kwargs['mask_dim'],
        'num_queries': kwargs['num_queries'],
        'num_layers': kwargs['dec_layers'],
        'num_heads': kwargs['nheads'],
        'feedforward_channels': kwargs['dim_feedforward'],
        'enforce_input_project': kwargs.get('enforce_input_project', False),
    }


@handler('aff', 'transformer_decoder')
def run_transformer_decoder(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, case.inputs
    decoder = load(PointMaskedDecoder(kwargs['num_classes'], kwargs['in_channels'], **decoder_settings(kwargs)), case)
    count = sum(name.removeprefix('x').isdigit() for name in inputs)
    leaves = leaves_of(case, ['mask_features', *(f'x{i}' for i in range(count))])
    canvas = canvas_of(inputs['mask_features_pos'])
    memory = [PointFeature(leaves[f'x{i}'], inputs[f'pos{i}'], canvas) for i in range(count)]
    image = points_to_image(leaves['mask_features'], inputs['mask_features_pos'], canvas)
    classes, masks = decoder(memory, image.flatten(2).transpose(1, 2), canvas)
    last = decoder(memory, image.flatten(2).transpose(1, 2), canvas, last_only=True)
    torch.testing.assert_close((classes[-1], masks[-1]), (last[0][0], last[1][0]), rtol=1e-4, atol=1e-4)
    produced = {f'out.pred_logits{i}': value for i, value in enumerate(classes)}
    produced |= {f'out.pred_masks{i}': value for i, value in enumerate(masks)}
    total = sum((value * inputs[name.replace('out.', 'cotangent_')]).sum() for name, value in produced.items())
    total.backward()
    return produced | gradients(decoder, leaves)
