"""Encoder, choice of proposals and decoder of BoxeR-2D."""

import pytest
import torch
from mmdet.models.layers import MLP
from torch import Tensor, nn

from boltz_mm.models.layers.box_position import BoxPositionalEncoding, reference_windows, valid_ratios
from boltz_mm.models.layers.box_transformer import (
    MASKED_LOGIT,
    BoxTransformerDecoder,
    BoxTransformerDecoderLayer,
    BoxTransformerEncoder,
    RoIState,
)
from boltz_mm.registry import MODELS

SHAPES = [(7, 10), (4, 5), (2, 3)]
TOKENS = sum(height * width for height, width in SHAPES)
LAYER = {'embed_dims': 16, 'num_heads': 2, 'num_levels': 3, 'feedforward_channels': 24}
MODES = ['v1', 'v2']


def randomize(module: nn.Module) -> nn.Module:
    """Nothing left at its initial 0, so that every parameter counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def encoder(layers: int = 2, **kwargs: object) -> BoxTransformerEncoder:
    return randomize(BoxTransformerEncoder(layers, {**LAYER, **kwargs}))


def decoder(layers: int = 2, **kwargs: object) -> BoxTransformerDecoder:
    return randomize(BoxTransformerDecoder(layers, {**LAYER, **kwargs}))


def padding_masks(valid: list[list[tuple[int, int]]], shapes: list[tuple[int, int]] = SHAPES) -> list[Tensor]:
    """For each level ``[B, h, w]``; ``valid`` holds for each level the real (h, w) of each image."""
    masks = []
    for shape, sizes in zip(shapes, valid, strict=True):
        mask = torch.ones(len(sizes), *shape, dtype=torch.bool)
        for image, (height, width) in enumerate(sizes):
            mask[image, :height, :width] = False
        masks.append(mask)
    return masks


def flat(masks: list[Tensor]) -> Tensor:
    return torch.cat([mask.flatten(1) for mask in masks], dim=1)


def queries(batch: int = 2, count: int = 5) -> dict:
    torch.manual_seed(1)
    return {
        'target': torch.randn(batch, count, 16),
        'query_pos': torch.randn(batch, count, 16),
        'memory': torch.randn(batch, TOKENS, 16),
        'spatial_shapes': SHAPES,
        'ref_windows': torch.cat((torch.rand(batch, count, 2), torch.rand(batch, count, 2) * 0.4 + 0.05), dim=-1),
    }


class Pipeline(nn.Module):
    """Tokens to decoder states and mask features of the best rated queries, as a detector would run it."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.encoder = encoder(num_levels=levels)
        self.decoder = decoder(num_levels=levels, with_mask=True, grid_size=4)
        self.encoding = BoxPositionalEncoding(16)
        self.classify, self.regress = nn.Linear(16, 1), MLP(16, 16, 4, 3)
        randomize(self)

    def forward(self, tokens: Tensor, shapes: list[tuple[int, int]], masks: list[Tensor] | None) -> tuple[Tensor, ...]:
        exact = torch.promote_types(tokens.dtype, torch.float32)
        windows = reference_windows(shapes, masks).to(exact)
        padding = (None, None) if masks is None else (flat(masks), valid_ratios(masks).to(exact))
        memory = self.encoder(tokens, self.encoding(windows), shapes, windows, *padding)
        chosen = self.encoder.select_proposals(memory, windows, padding[0], self.classify, self.regress, 6)
        # The order of the queries is free; by rating it is comparable.
        order = chosen.class_logits[..., 0].gather(1, chosen.topk_indexes).argsort(1)[..., None]
        target, query_pos, ref = (
            t.gather(1, order.expand(-1, -1, t.shape[-1]))
            for t in (chosen.target, chosen.query_pos, chosen.ref_windows)
        )
        states = self.decoder(target, query_pos, memory, shapes, ref, *padding)
        rows = [torch.arange(6)] * len(tokens)
        rois = [self.decoder.compute_rois(i, state, rows) for i, state in enumerate(states.roi_states)]
        return states.hidden_states, ref, torch.stack(rois).unflatten(1, (len(tokens), 6))


def test_encoder_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = encoder(), encoder(with_cp=True)
    memory, windows = torch.randn(2, TOKENS, 16), reference_windows(SHAPES)
    pos = BoxPositionalEncoding(16)(windows)
    results = []
    for module in (plain, saving):
        source = memory.clone().requires_grad_()
        output = module(source, pos, SHAPES, windows)
        output.sin().sum().backward()
        results.append([output, source.grad, *(p.grad for n, p in module.named_parameters() if 'layers' in n)])
    assert results[0][0].shape == (2, TOKENS, 16)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_nothing_at_padded_tokens_reaches_the_others() -> None:
    module = encoder()
    masks = padding_masks([[(7, 10), (4, 8)], [(4, 5), (2, 4)], [(2, 3), (1, 2)]])
    mask, windows = flat(masks), reference_windows(SHAPES, masks)
    pos = BoxPositionalEncoding(16)(windows)
    tokens = torch.randn(2, TOKENS, 16)
    results = []
    for noise in (0.0, 100.0):
        noisy = [t + noise * mask[..., None] * torch.randn(2, TOKENS, 1) for t in (tokens, pos, windows)]
        output = module(noisy[0], noisy[1], SHAPES, noisy[2], mask, valid_ratios(masks))
        results.append(output[~mask])
    assert torch.equal(*results)


def test_no_masks_equals_all_false_masks() -> None:
    model, tokens = Pipeline(), torch.randn(1, TOKENS, 16)
    masks = padding_masks([[shape] for shape in SHAPES])
    for alone, masked in zip(model(tokens, SHAPES, None), model(tokens, SHAPES, masks), strict=True):
        assert torch.equal(alone, masked)


def test_an_image_gives_the_same_alone_and_padded_in_a_batch() -> None:
    small = [(5, 8), (3, 4), (1, 2)]
    model = Pipeline().double()
    tokens = torch.randn(2, TOKENS, 16, dtype=torch.float64)
    masks = padding_masks([list(pair) for pair in zip(SHAPES, small, strict=True)])
    together = model(tokens, SHAPES, masks)
    for image, shapes in enumerate((SHAPES, small)):
        alone = model(tokens[image][~flat(masks)[image]][None], shapes, None)
        torch.testing.assert_close(together[1][image], alone[1][0], rtol=1e-5, atol=1e-6)
        for got, expected in ((together[0], alone[0]), (together[2], alone[2])):
            torch.testing.assert_close(got[:, image], expected[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16, 'autocast'])
def test_five_levels_in_other_precisions(dtype: torch.dtype | str) -> None:
    shapes = [*SHAPES, (1, 2), (1, 1)]
    model = Pipeline(levels=5)
    tokens = torch.randn(2, TOKENS + 3, 16)
    if dtype == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            results = model(tokens, shapes, None)
    else:
        results = model.to(dtype)(tokens.to(dtype), shapes, None)
        assert results[0].dtype == results[2].dtype == dtype
    assert results[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)  # windows
    assert [tuple(r.shape) for r in results] == [(2, 2, 6, 16), (2, 6, 4), (2, 2, 6, 4, 4, 16)]
    assert all(r.isfinite().all() for r in results)
    sum(r.float().sin().sum() for r in (results[0], results[2])).backward()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters())


def proposals(model: BoxTransformerEncoder, memory: Tensor, masks: list[Tensor] | None, number: int, windows: Tensor):
    classify, regress = randomize(nn.Linear(16, 1)), randomize(MLP(16, 16, 4, 3))
    mask = None if masks is None else flat(masks)
    return model.select_proposals(memory, windows, mask, classify, regress, number), classify, regress


def test_proposals_are_the_best_usable_tokens() -> None:
    shapes = [(2, 60), (1, 30)]  # 60 columns: the outermost centres lie within 0.01 of the border
    masks = padding_masks([[(2, 60), (2, 48)], [(1, 30), (1, 24)]], shapes)
    windows = reference_windows(shapes, masks)
    model, memory = encoder(0), torch.randn(2, 150, 16, requires_grad=True)
    found, classify, regress = proposals(model, memory, masks, 9, windows)

    border = torch.zeros(2, 150, dtype=torch.bool)
    border[0, [0, 59, 60, 119]] = True
    assert torch.equal(found.usable, ~(border | flat(masks)))
    rating = classify(memory)
    assert torch.equal(found.class_logits, torch.where(found.usable[..., None], rating, MASKED_LOGIT))
    best = rating[..., 0].masked_fill(~found.usable, -torch.inf).topk(9).indices
    assert torch.equal(found.topk_indexes.sort().values, best.sort().values)
    for image in range(2):
        for row, token in enumerate(found.topk_indexes[image].tolist()):
            expected = (regress(memory[image, token]) + windows[image, token].logit(eps=1e-5)).sigmoid()
            torch.testing.assert_close(found.ref_windows[image, row], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.target[image, row], model.enc_linear(memory[image, token]))
    assert torch.equal(found.query_pos, BoxPositionalEncoding(16)(found.ref_windows))


def test_proposals_pass_gradients_only_where_they_should() -> None:
    model, memory = encoder(0), torch.randn(2, TOKENS, 16, requires_grad=True)
    found, classify, regress = proposals(model, memory, None, 5, reference_windows(SHAPES))
    assert not found.ref_windows.requires_grad
    found.target.sum().backward(retain_graph=True)
    assert model.enc_linear[0].bias.grad is not None
    assert memory.grad is None
    assert classify.weight.grad is None
    found.class_logits.sum().backward()
    assert memory.grad.abs().sum() > 0
    assert classify.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in regress.parameters())


def test_fewer_tokens_than_queries() -> None:
    found, _, _ = proposals(encoder(0), torch.randn(1, 6, 16), None, 300, reference_windows([(2, 3)]))
    assert found.topk_indexes.sort().values.tolist() == [[0, 1, 2, 3, 4, 5]]


def joint(layer: BoxTransformerDecoderLayer, arguments: dict, mask: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """The whole layer with the mask features of all queries at once, as the paper's code runs it."""
    query = arguments['target'] + arguments['query_pos']
    x = layer.norm1(arguments['target'] + layer.self_attn(query, query, arguments['target'])[0])
    names = ('memory', 'spatial_shapes', 'ref_windows')
    attended, masks = layer.multihead_attn(x + arguments['query_pos'], *(arguments[n] for n in names), mask, ratios)

    def feedforward(t: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(t).relu())

    x = layer.norm2(x + attended)
    roi = layer.norm2(x[:, :, None, None] + masks)
    x = layer.norm3(x + feedforward(x))
    if layer.residual_mode == 'v1':
        return x, layer.norm3(roi + feedforward(roi))
    return x, layer.norm3(x[:, :, None, None] + roi)


ROWS = {
    'uneven': [[3, 0], [1]],
    'one image without': [[], [4, 4, 2]],
    'all': [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    'none': [[], []],
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('rows', ROWS.values(), ids=ROWS)
def test_mask_features_of_some_queries_equal_the_joint_computation(mode: str, rows: list[list[int]]) -> None:
    """Numbers and gradients, in double: what is left is the order of sums."""
    layer = decoder(1, with_mask=True, residual_mode=mode).double().layers[0]
    masks = padding_masks([[(7, 10), (4, 8)], [(4, 5), (2, 4)], [(2, 3), (1, 2)]])
    mask, ratios = flat(masks), valid_ratios(masks).double()
    chosen = [torch.tensor(image, dtype=torch.int64) for image in rows]
    leaves = {k: v.double() if isinstance(v, Tensor) else v for k, v in queries().items()}
    weight, roi_weight = torch.randn(2, 5, 16).double(), torch.randn(sum(map(len, rows)), 14, 14, 16).double()

    results = []
    for together in (True, False):
        layer.zero_grad()
        arguments = {
            k: v.clone().requires_grad_() if k in ('target', 'query_pos', 'memory') else v for k, v in leaves.items()
        }
        if together:
            output, every = joint(layer, arguments, mask, ratios)
            rois = torch.cat([image[index] for image, index in zip(every, chosen, strict=True)])
        else:
            output, state = layer(**arguments, key_padding_mask=mask, valid_ratios=ratios)
            rois = layer.forward_roi(state, chosen)
        ((output * weight).sum() + (rois * roi_weight).sum()).backward()
        gradients = [arguments[name].grad for name in ('target', 'query_pos', 'memory')]
        results.append([output, rois, *gradients, *(p.grad for p in layer.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('mode', MODES)
def test_mask_features_do_not_depend_on_the_other_rows(mode: str) -> None:
    module = decoder(with_mask=True, residual_mode=mode)
    states = module(**queries()).roi_states
    for index, state in enumerate(states):
        every = module.compute_rois(index, state, [torch.arange(5)] * 2).unflatten(0, (2, 5))
        some = module.compute_rois(index, state, [torch.tensor([2]), torch.tensor([4, 0])])
        torch.testing.assert_close(some, torch.stack([every[0, 2], every[1, 4], every[1, 0]]), rtol=0, atol=1e-6)


def test_decoder_gives_all_layers_and_keeps_what_it_is_asked_for() -> None:
    module = decoder(3, with_mask=True, grid_size=4)
    arguments = queries()
    result = module(**arguments, roi_layers=(2,))
    assert result.hidden_states.shape == (3, 2, 5, 16)
    assert [type(state) for state in result.roi_states] == [type(None), type(None), RoIState]
    assert torch.equal(result.roi_states[2].output, result.hidden_states[2])
    every = module(**arguments)
    assert torch.equal(every.hidden_states, result.hidden_states)
    rois = [module.compute_rois(2, r.roi_states[2], [torch.tensor([1])] * 2) for r in (result, every)]
    assert rois[0].shape == (2, 4, 4, 16)
    assert torch.equal(*rois)
    assert decoder(2)(**arguments).roi_states == (None, None)


def test_every_decoder_parameter_gets_a_gradient_without_any_mask() -> None:
    """So that a step without objects leaves no parameter behind, whatever the process group expects."""
    module = decoder(with_mask=True)
    module(**queries()).hidden_states.sin().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_initialisation() -> None:
    for kind, cfg in (('Encoder', LAYER), ('Decoder', {**LAYER, 'with_mask': True})):
        module = MODELS.build({'type': f'boltz_mm.BoxTransformer{kind}', 'num_layers': 2, 'layer_cfg': cfg})
        randomize(module)
        module.init_weights()
        attention = module.layers[1].self_attn if kind == 'Encoder' else module.layers[1].multihead_attn
        assert not attention.linear_box_weight.any()
        assert not attention.linear_attn_weight.any()
        assert 0 <= attention.linear_box_bias.min() < attention.linear_box_bias.max() < 1
        bound = (6 / (16 + 24)) ** 0.5
        assert 0.9 * bound < module.layers[1].linear1.weight.abs().max() <= bound
    bound = (6 / (16 + 48)) ** 0.5
    assert 0.9 * bound < module.layers[0].self_attn.in_proj_weight.abs().max() <= bound


def test_official_names() -> None:
    names = {name.split('.', 2)[2] for name in decoder(1).state_dict()}
    attention = {'linear_box_weight', 'linear_box_bias', 'linear_attn_weight', 'linear_attn_bias', 'kernel_indices'}
    attention |= {f'{p}_proj.{k}' for p in ('value', 'out') for k in ('weight', 'bias')}
    expected = {f'multihead_attn.{name}' for name in attention}
    expected |= {f'self_attn.{n}' for n in ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')}
    expected |= {f'{n}.{k}' for n in ('linear1', 'linear2', 'norm1', 'norm2', 'norm3') for k in ('weight', 'bias')}
    assert names == expected
    assert {n for n in encoder(1).state_dict() if not n.startswith('layers')} == {
        f'enc_linear.{i}.{k}' for i in (0, 1) for k in ('weight', 'bias')
    }


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="got 'v3'"):
        BoxTransformerDecoderLayer(**LAYER, residual_mode='v3')
    module = decoder(1, with_mask=True)
    state = module(**queries()).roi_states[0]
    with pytest.raises(ValueError, match='2 images, got 1'):
        module.compute_rois(0, state, [torch.tensor([0])])
