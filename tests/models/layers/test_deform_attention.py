"""Drop-in deformable attention: the numbers of mmcv, the switch, models of mmdet."""

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention, multi_scale_deform_attn
from mmdet.registry import MODELS as DETECTORS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from boltz_mm.models.layers.deform_attention import NativeMultiScaleDeformableAttention, native_deform_attention
from boltz_mm.registry import MODELS

SHAPES = torch.tensor([[7, 10], [4, 5], [2, 3]])
STARTS = torch.cat([torch.zeros(1, dtype=torch.int64), SHAPES.prod(1).cumsum(0)[:-1]])
TOKENS = int(SHAPES.prod(1).sum())


def randomize(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Nothing left at its initial 0, so that every parameter counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module.eval()


def pair(**kwargs: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = randomize(MultiScaleDeformableAttention(num_levels=3, **kwargs))
    ours = NativeMultiScaleDeformableAttention(num_levels=3, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(module: nn.Module, inputs: dict[str, Tensor], cotangent: Tensor) -> list[Tensor]:
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    module.zero_grad()
    output = module(**leaves, spatial_shapes=SHAPES, level_start_index=STARTS)
    output.backward(cotangent)
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [output, *gradients, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('reference', [2, 4])
@pytest.mark.parametrize(
    'kwargs',
    [{'embed_dims': 32, 'num_heads': 4}, {'embed_dims': 16, 'num_heads': 2, 'num_points': 3, 'value_proj_ratio': 0.5}],
)
def test_same_numbers_as_mmcv(kwargs: dict, reference: int, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, **kwargs)
    batch, queries, channels = 2, 5, kwargs['embed_dims']

    def tokens(count: int) -> Tensor:
        return torch.randn((batch, count, channels) if batch_first else (count, batch, channels))

    padded = torch.zeros(batch, TOKENS, dtype=torch.bool)
    padded[1, ::3] = True
    inputs = {
        'query': tokens(queries),
        'value': tokens(TOKENS),
        'identity': tokens(queries),
        'query_pos': tokens(queries),
        'key_padding_mask': padded,
        'reference_points': torch.rand(batch, queries, 3, reference),
    }
    cotangent = tokens(queries)
    for got, expected in zip(run(ours, inputs, cotangent), run(theirs, inputs, cotangent), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_defaults_are_query_as_value_and_identity() -> None:
    theirs, ours = pair(embed_dims=16, num_heads=2, batch_first=True)
    inputs = {'query': torch.randn(2, TOKENS, 16), 'reference_points': torch.rand(2, TOKENS, 3, 2)}
    cotangent = torch.randn(2, TOKENS, 16)
    for got, expected in zip(run(ours, inputs, cotangent), run(theirs, inputs, cotangent), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_same_initial_weights_and_registered() -> None:
    torch.manual_seed(3)
    theirs = MultiScaleDeformableAttention(32, 4, 3)
    torch.manual_seed(3)
    ours = MODELS.build(
        {'type': 'boltz_mm.MultiScaleDeformableAttention', 'embed_dims': 32, 'num_heads': 4, 'num_levels': 3}
    )
    assert type(ours) is NativeMultiScaleDeformableAttention
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_half_precision_keeps_coordinates_exact() -> None:
    """Far right in a wide level, float16 coordinates are off by cells; ours are not."""
    torch.manual_seed(0)
    width = 4096
    module = NativeMultiScaleDeformableAttention(8, 1, 1, num_points=1, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        for linear in (module.value_proj, module.output_proj):
            linear.weight.copy_(torch.eye(8))
        module.sampling_offsets.bias.zero_()
    value = torch.arange(width, dtype=torch.float32).view(1, width, 1).expand(1, width, 8) / 8
    arguments = {
        'query': torch.zeros(1, 1, 8).half(),
        'value': value.half(),
        'reference_points': torch.tensor([4000.5 / width, 0.5]).view(1, 1, 1, 2),
        'spatial_shapes': torch.tensor([[1, width]]),
    }
    output = module.half()(**arguments)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), torch.full((1, 1, 8), 500.0), rtol=0, atol=0.25)


def test_wrong_reference_points_raise() -> None:
    _, ours = pair(embed_dims=16, num_heads=2, batch_first=True)
    with pytest.raises(ValueError, match='2 or 4'):
        ours(torch.rand(1, TOKENS, 16), reference_points=torch.rand(1, TOKENS, 3, 3), spatial_shapes=SHAPES)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of mmcv's own function."""
    calls = []
    original = multi_scale_deform_attn.multi_scale_deformable_attn_pytorch

    def function(*args: Tensor) -> Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(multi_scale_deform_attn, 'multi_scale_deformable_attn_pytorch', function)
    return calls


def test_switch_is_taken_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    before = vars(multi_scale_deform_attn).copy()
    theirs, _ = pair(embed_dims=16, num_heads=2, batch_first=True)
    inputs = {'query': torch.randn(2, TOKENS, 16), 'reference_points': torch.rand(2, TOKENS, 3, 2)}

    def output() -> Tensor:
        return theirs(**inputs, spatial_shapes=SHAPES, level_start_index=STARTS)

    expected = output()
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match='inside'), native_deform_attention():
        torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-5)
        outer = native_deform_attention()
        inner = native_deform_attention()
        outer.restore()
        outer.restore()
        torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-5)
        inner.restore()
        output()
        assert len(calls) == 1
        raise RuntimeError('inside')
    assert vars(multi_scale_deform_attn) == before
    assert torch.equal(output(), expected)
    assert len(calls) == 2


def shrink(cfg: Config) -> None:
    for part in (cfg.encoder, cfg.get('decoder')):
        if part is not None:
            part.num_layers = 2


def test_deformable_detr_from_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    cfg = get_config('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py').model
    cfg.backbone.update(depth=18, init_cfg=None, norm_eval=False)
    cfg.neck.in_channels = [128, 256, 512]
    cfg.num_queries = 10
    shrink(cfg)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = DETECTORS.build(cfg)
    randomize(model.encoder, 0.05)
    randomize(model.decoder, 0.05)
    torch.nn.init.normal_(model.level_embed)  # mmdet builds it of whatever lies in memory, NaN at times
    model.eval()
    images = torch.randn(2, 3, 64, 96)
    samples = [DetDataSample(metainfo={'img_shape': (64, 96), 'batch_input_shape': (64, 96)}) for _ in images]
    samples[1].set_metainfo({'img_shape': (48, 80)})

    def train_step() -> list[Tensor]:
        model.zero_grad()
        classes, boxes = model._forward(images, samples)[:2]
        (classes.square().mean() + boxes.square().mean()).backward()
        parts = (*model.encoder.parameters(), *model.decoder.parameters(), *model.neck.parameters())
        return [classes, boxes, *(p.grad.clone() for p in parts if p.grad is not None)]

    expected = train_step()
    assert len(calls) == 4
    with native_deform_attention():
        got = train_step()
    assert len(calls) == 4
    assert len(got) > 80
    for ours, theirs in zip(got, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_pixel_decoder_of_mask2former_from_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    cfg = get_config('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py').model.panoptic_head
    channels = [8, 16, 24, 32]
    torch.manual_seed(0)
    shrink(cfg.pixel_decoder)
    decoder = DETECTORS.build(
        dict(cfg.pixel_decoder, in_channels=channels, feat_channels=cfg.feat_channels, out_channels=cfg.out_channels)
    )
    randomize(decoder.encoder, 0.05)
    features = [torch.randn(1, n, 32 // 2**i, 40 // 2**i) for i, n in enumerate(channels)]
    with torch.no_grad():
        expected_mask, expected_levels = decoder(features)
        assert len(calls) == 2
        with native_deform_attention():
            mask, levels = decoder(features)
    assert len(calls) == 2
    torch.testing.assert_close(mask, expected_mask, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(levels, expected_levels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
