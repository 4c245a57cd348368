"""Box, instance and rotated-box attention modules."""

import pytest
import torch
from torch import Tensor, nn

from boltz_mm.models.layers.box_attention import Box3dAttention, BoxAttention, InstanceAttention
from boltz_mm.registry import MODELS

SHAPES = [(7, 10), (4, 5), (1, 3)]
TOKENS = sum(height * width for height, width in SHAPES)
CLASSES = [BoxAttention, InstanceAttention, Box3dAttention]


def randomize(module: nn.Module) -> nn.Module:
    """Nothing left at its initial 0, so that every parameter counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def windows(*shape: int) -> Tensor:
    centre, size = torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.4 + 0.05
    return torch.cat((centre, size, torch.rand(*shape, 1)), dim=-1)  # with an angle code, which 2D windows drop


def build(cls: type[nn.Module], levels: int = 3, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return randomize(cls(embed_dims=16, num_levels=levels, num_heads=4, **kwargs))


def inputs(cls: type[nn.Module], batch: int = 2, queries: int = 6, heads: int | None = None) -> dict:
    torch.manual_seed(1)
    shape = (batch, queries) if heads is None else (batch, queries, heads)
    boxes = windows(*shape)
    return {
        'query': torch.randn(batch, queries, 16),
        'value': torch.randn(batch, TOKENS, 16),
        'spatial_shapes': SHAPES,
        'ref_windows': boxes if cls is Box3dAttention else boxes[..., :4],
    }


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    ('cls', 'box', 'weights', 'points'),
    [(BoxAttention, 4, 4, 4), (InstanceAttention, 4, 4, 196), (Box3dAttention, 5, 4, 4)],
)
def test_official_names_shapes_and_start(cls: type[nn.Module], box: int, weights: int, points: int) -> None:
    module = MODELS.build({'type': f'boltz_mm.{cls.__name__}', 'embed_dims': 32, 'num_levels': 3, 'num_heads': 4})
    rows = 3 * 4
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        'linear_box_weight': (rows * box, 32),
        'linear_box_bias': (rows * box,),
        'linear_attn_weight': (rows * weights, 32),
        'linear_attn_bias': (rows * weights,),
        'kernel_indices': (points, 2),
        'value_proj.weight': (32, 32),
        'value_proj.bias': (32,),
        'out_proj.weight': (32, 32),
        'out_proj.bias': (32,),
    }
    randomize(module)
    module.init_weights()
    for name, parameter in module.named_parameters():
        if name == 'linear_box_bias':
            assert 0 <= parameter.min() < parameter.max() < 1
        elif name.endswith('proj.weight'):
            assert 0 < parameter.abs().max() <= (6 / 64) ** 0.5
        else:
            assert not parameter.any()


@pytest.mark.parametrize('cls', CLASSES)
def test_shapes_dtype_and_gradients_in_double(cls: type[nn.Module]) -> None:
    module = build(cls).double()
    arguments = {k: v.double().requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs(cls).items()}
    results = outputs(module(**arguments))
    shapes = [(2, 6, 16), (2, 6, 14, 14, 16)]
    assert [tuple(r.shape) for r in results] == shapes[: len(results)]
    assert all(r.dtype == torch.float64 for r in results)
    sum(r.sin().sum() for r in results).backward()
    for tensor in (*module.parameters(), arguments['query'], arguments['value'], arguments['ref_windows']):
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize('cls', CLASSES)
def test_all_false_mask_and_full_ratios_change_nothing(cls: type[nn.Module]) -> None:
    module, arguments = build(cls), inputs(cls)
    plain = outputs(module(**arguments))
    mask, ratios = torch.zeros(2, TOKENS, dtype=torch.bool), torch.ones(2, 3, 2)
    masked = outputs(module(**arguments, key_padding_mask=mask, valid_ratios=ratios))
    assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True))


@pytest.mark.parametrize('cls', [BoxAttention, InstanceAttention])
def test_padding_an_image_changes_nothing(cls: type[nn.Module]) -> None:
    """Padded right and below, with noise in the padding, an image gives what it gives alone."""
    module, arguments = build(cls).double(), inputs(cls)
    arguments = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    alone = outputs(module(**arguments))
    padded_shapes = [(9, 13), (5, 7), (2, 4)]
    values, masks, ratios = [], [], []
    levels = arguments['value'].split([h * w for h, w in SHAPES], dim=1)
    for level, (h, w), (height, width) in zip(levels, SHAPES, padded_shapes, strict=True):
        canvas = torch.randn(2, height, width, 16, dtype=torch.float64)
        canvas[:, :h, :w] = level.unflatten(1, (h, w))
        mask = torch.ones(2, height, width, dtype=torch.bool)
        mask[:, :h, :w] = False
        values.append(canvas.flatten(1, 2))
        masks.append(mask.flatten(1))
        ratios.append([w / width, h / height])
    arguments.update(value=torch.cat(values, dim=1), spatial_shapes=padded_shapes)
    ratios = torch.tensor(ratios, dtype=torch.float64).expand(2, -1, -1)
    padded = outputs(module(**arguments, key_padding_mask=torch.cat(masks, dim=1), valid_ratios=ratios))
    for ours, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('cls', CLASSES)
def test_values_at_masked_tokens_are_not_seen(cls: type[nn.Module]) -> None:
    module, arguments = build(cls), inputs(cls)
    mask = torch.rand(2, TOKENS) < 0.4
    before = outputs(module(**arguments, key_padding_mask=mask))
    arguments['value'] = torch.where(mask[..., None], torch.full((), 1e6), arguments['value'])
    after = outputs(module(**arguments, key_padding_mask=mask))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(after[0], outputs(module(**arguments))[0])


@pytest.mark.parametrize('cls', CLASSES)
def test_windows_per_head(cls: type[nn.Module]) -> None:
    module, arguments = build(cls), inputs(cls)
    shared = outputs(module(**arguments))
    arguments['ref_windows'] = arguments['ref_windows'].unsqueeze(2).expand(-1, -1, 4, -1)
    for a, b in zip(shared, outputs(module(**arguments)), strict=True):
        assert torch.equal(a, b)
    other = inputs(cls, heads=4)
    assert not torch.allclose(outputs(module(**other))[0], shared[0])


@pytest.mark.parametrize('cls', CLASSES)
def test_any_subset_of_queries_gives_the_same_numbers(cls: type[nn.Module]) -> None:
    module, arguments = build(cls), inputs(cls)
    everything = outputs(module(**arguments))
    rows = torch.tensor([4, 1, 1])
    arguments.update(query=arguments['query'][:, rows], ref_windows=arguments['ref_windows'][:, rows])
    for ours, expected in zip(outputs(module(**arguments)), everything, strict=True):
        torch.testing.assert_close(ours, expected[:, rows], rtol=0, atol=1e-6)
    arguments.update(query=arguments['query'][:, :0], ref_windows=arguments['ref_windows'][:, :0])
    assert [r.shape[1] for r in outputs(module(**arguments))] == [0] * len(everything)


def test_instance_attention_without_masks() -> None:
    module, arguments = build(InstanceAttention), inputs(InstanceAttention)
    output, masks = module(**arguments)
    assert masks.shape == (2, 6, 14, 14, 16)
    # The two kernels add in different orders: equal up to the rounding of values of about 10.
    torch.testing.assert_close(module(**arguments, mask_output=False), output, rtol=0, atol=1e-5)


def test_offsets_are_eighths_of_the_window() -> None:
    module = BoxAttention(embed_dims=16, num_levels=1, num_heads=1)
    with torch.no_grad():
        module.linear_box_bias.copy_(torch.tensor([1.0, -2.0, 4.0, -16.0]))
    window = torch.tensor([0.5, 0.5, 0.16, 0.4]).view(1, 1, 4)
    boxes = module.predict_boxes(torch.randn(1, 1, 16), window)
    torch.testing.assert_close(boxes.flatten(), torch.tensor([0.52, 0.4, 0.24, -0.4]))


def test_rotated_attention_without_angle_is_box_attention() -> None:
    plain, turned = build(BoxAttention), build(Box3dAttention, with_rotation=False)
    turned.load_state_dict(plain.state_dict())  # the same grid, as it is 2 x 2
    arguments = inputs(BoxAttention)
    expected = plain(**arguments)
    code = torch.zeros(2, 6, 1)
    arguments['ref_windows'] = torch.cat((arguments['ref_windows'], code), dim=-1)
    torch.testing.assert_close(turned(**arguments), expected, rtol=1e-5, atol=1e-6)
    arguments['ref_windows'][..., 4] = 0.8
    assert not torch.allclose(turned(**arguments), expected)


def test_a_full_turn_changes_nothing_and_extra_columns_are_ignored() -> None:
    module, arguments = build(Box3dAttention), inputs(Box3dAttention)
    expected = module(**arguments)
    arguments['ref_windows'] = torch.cat((arguments['ref_windows'], torch.rand(2, 6, 2)), dim=-1)
    arguments['ref_windows'][..., 4] += 1
    torch.testing.assert_close(module(**arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('cls', CLASSES)
def test_five_levels(cls: type[nn.Module]) -> None:
    module, arguments = build(cls, levels=5), inputs(cls)
    shapes = [*SHAPES, (2, 2), (1, 1)]
    arguments.update(spatial_shapes=shapes, value=torch.randn(2, TOKENS + 5, 16))
    assert outputs(module(**arguments))[0].shape == (2, 6, 16)


@pytest.mark.parametrize('cls', CLASSES)
def test_autocast_keeps_boxes_and_logits_in_float32(cls: type[nn.Module]) -> None:
    module, arguments = build(cls), inputs(cls)
    exact = outputs(module(**arguments))
    with torch.autocast('cpu', torch.bfloat16):
        assert module.predict_logits(arguments['query']).dtype == torch.float32
        if cls is Box3dAttention:
            boxes, angles = module.predict_rotated_boxes(arguments['query'], arguments['ref_windows'])
            assert angles.dtype == torch.float32
        else:
            boxes = module.predict_boxes(arguments['query'], arguments['ref_windows'])
        assert boxes.dtype == torch.float32
        for got, expected in zip(outputs(module(**arguments)), exact, strict=True):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match='even, got 7'):
        InstanceAttention(grid_size=7)
    with pytest.raises(ValueError, match='16 and 3'):
        BoxAttention(embed_dims=16, num_heads=3)
    arguments = inputs(BoxAttention)
    arguments['spatial_shapes'] = SHAPES[:2]
    with pytest.raises(ValueError, match='built for 3 levels'):
        build(BoxAttention)(**arguments)
