"""AutoFocusFormer backbone."""

import copy
import threading

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.models.backbones.aff import AFF, ARCHS, layout_of_weights
from boltz_mm.models.layers.cluster_merging import count_reserved
from boltz_mm.models.layers.cluster_stage import ClusterStage
from boltz_mm.models.layers.drop_path import DropPath

ARCH = {'embed_dims': (8, 12, 16, 24), 'depths': (1, 2, 1, 1), 'num_heads': (2, 3, 2, 4)}
SMALL = {'arch': ARCH, 'cluster_size': 4, 'nbhd_size': 12}


def build(**kwargs: object) -> AFF:
    """A tiny backbone in evaluation with nothing left at its initial 0 or 1."""
    torch.manual_seed(0)
    model = AFF(**{**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_levels(a: tuple, b: tuple) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.pos, y.pos)
        torch.testing.assert_close(x.feat, y.feat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('arch', 'classifier', 'points'),
    [
        ('mini', 6_754_451, 6_370_283),
        ('mini_1_5th', 6_754_451, 6_370_283),
        ('tiny', 27_020_367, 26_508_263),
        ('tiny_1_5th', 27_020_367, 26_508_263),
        ('small', 42_612_961, 41_845_305),
        ('small_1_5th', 42_612_961, 41_845_305),
        ('base', 75_341_075, 74_317_867),
        ('base_384', 75_341_075, 74_317_867),
    ],
)
def test_published_parameter_counts(arch: str, classifier: int, points: int) -> None:
    with torch.device('meta'):
        body, levels = AFF(arch, out_type='avg'), AFF(arch)
    head = 1001 * ARCHS[arch]['embed_dims'][-1] - ARCHS[arch]['embed_dims'][-1] + 1000
    assert sum(p.numel() for p in body.parameters()) == classifier - head
    assert sum(p.numel() for p in levels.parameters()) == points
    assert body.layers[0].downsample.ds_rate == (0.2 if arch.endswith('5th') else 0.25)


@pytest.mark.parametrize(
    ('size', 'ds_rate'),
    [((1, 1), 0.25), ((3, 5), 0.2), ((1, 5000), 0.25), ((72, 96), 0.2), ((33, 20), 0.25), ((61, 230), 0.2)],
)
def test_any_size_gives_tokens_of_the_grid(size: tuple[int, int], ds_rate: float) -> None:
    model, image = build(ds_rate=ds_rate), images(2, 3, *size)
    levels = model(image)
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    expected = height * width
    for i, level in enumerate(levels):
        if i:
            expected = max(int(expected * ds_rate), count_reserved((height, width), 2**i))
        assert level.shape == (height, width)
        assert level.feat.shape == (2, expected, ARCH['embed_dims'][i])
        assert level.feat.isfinite().all()
        x, y = level.pos.long().unbind(-1)
        assert ((x >= 0) & (x < width) & (y >= 0) & (y < height)).all()
        cells = y * width + x
        assert all(len(row.unique()) == expected for row in cells)
        if i:
            step = 2 ** (i + 1)
            reserved = {r * width + c for r in range(0, height, step) for c in range(0, width, step)}
            assert all(reserved <= set(row.tolist()) for row in cells)


def test_earlier_images_leave_no_trace() -> None:
    sizes = [(64, 64), (28, 28), (96, 40), (64, 64)]
    model, seen = build(), []
    for i, size in enumerate(sizes):
        seen.append(model(images(1 + i, 3, *size)))
    for i, size in enumerate(sizes):
        assert_same_levels(seen[i], build()(images(1 + i, 3, *size)))
    assert len(model.size_cache) == 3


def test_the_grid_is_clustered_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, cluster = build(cache_size=1), [], ClusterStage.cluster
    first = model.layers[0]
    monkeypatch.setattr(ClusterStage, 'cluster', lambda s, *a: calls.append(s is first) or cluster(s, *a))
    with torch.inference_mode():
        model(images(1, 3, 64, 64))
    model(images(3, 3, 64, 64))[0].feat.sum().backward()
    assert sum(calls) == 1
    model(images(1, 3, 32, 64))
    model(images(1, 3, 64, 64))
    assert sum(calls) == 3
    other = copy.deepcopy(model)
    assert (len(model.size_cache), len(other.size_cache)) == (1, 0)
    assert not [key for key in model.state_dict() if 'cache' in key]
    assert_same_levels(model(images(1, 3, 64, 64)), other(images(1, 3, 64, 64)))


def test_threads_share_a_model() -> None:
    model, results = build(), {}
    batches = [images(1, 3, 40 + 4 * (i % 3), 60, seed=i) for i in range(6)]
    wanted = [build()(batch) for batch in batches]

    def run(i: int) -> None:
        with torch.inference_mode():
            results[i] = model(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for i, levels in enumerate(wanted):
        assert_same_levels(levels, results[i])


def test_per_image_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.cat([images(1, 3, 96, 80, seed=i) for i in range(3)])
    model = build(per_image=True)
    together = model(batch)
    alone = [model(image[None]) for image in batch]
    assert_same_levels(together, [level._replace(
        feat=torch.cat([a[i].feat for a in alone]), pos=torch.cat([a[i].pos for a in alone])
    ) for i, level in enumerate(together)])  # fmt: skip
    # The maximum over the batch changes keys by their last bits, seldom the result: see whether it was asked for.
    seen, cluster = [], ops.space_filling_clusters
    monkeypatch.setattr(ops, 'space_filling_clusters', lambda *a, **k: seen.append(k['per_image']) or cluster(*a, **k))
    model(batch)
    build()(batch)
    assert seen == [True, True, False, False, False]


def test_nan_pixels_stay_in_their_image() -> None:
    batch = images(2, 3, 64, 64)
    model = build(per_image=True)
    wanted = model(batch)
    batch[0, :, 10, 20] = torch.nan
    levels = model(batch)
    assert levels[0].feat[0].isnan().any()
    for level, clean in zip(levels, wanted, strict=True):
        assert torch.equal(level.pos[1], clean.pos[1])
        torch.testing.assert_close(level.feat[1], clean.feat[1])
        x, y = level.pos[0].long().unbind(-1)
        assert len((y * 16 + x).unique()) == len(x)
    batch[0] = torch.nan
    assert model(batch)[3].feat[0].isnan().all()


def test_images_are_checked() -> None:
    for shape in ((3, 64, 64), (1, 3, 0, 64), (0, 3, 64, 64)):
        with pytest.raises(ValueError, match='expected images'):
            build()(torch.zeros(shape))


def test_frozen_stages_and_norm_eval() -> None:
    model = build(frozen_stages=2).train()
    frozen = [model.patch_embed, model.layers[0], model.layers[1], model.norm0, model.norm1]
    names = {id(p) for part in frozen for p in part.parameters()}
    assert all(p.requires_grad != (id(p) in names) for p in model.parameters())
    assert not any(module.training for part in frozen for module in part.modules())
    assert model.layers[2].training
    before = model.patch_embed.bn.running_mean.clone()
    sum(level.feat.sum() for level in model(images(2, 3, 32, 32))).backward()
    assert torch.equal(model.patch_embed.bn.running_mean, before)
    model = build(norm_eval=True).train()
    assert not model.patch_embed.bn.training
    assert model.patch_embed.bn.weight.requires_grad


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_checkpointing_changes_no_gradient(drop_path_rate: float) -> None:
    gradients = []
    for with_cp in (False, True):
        model = build(with_cp=with_cp, drop_path_rate=drop_path_rate, layer_scale=0.1).train()
        torch.manual_seed(3)
        sum(level.feat.square().sum() for level in model(images(2, 3, 64, 48))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_stochastic_depth_drops_whole_samples() -> None:
    model = build(drop_path_rate=0.4).train()
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    layer, branch = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    out = layer(branch)
    assert out.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.mean() == pytest.approx(1, abs=0.05)
    layer.draw = lambda x, keep: torch.tensor([0.0, 1.0])
    assert layer(branch[:2])[:, 0, 0].tolist() == [0, pytest.approx(4 / 3)]
    assert layer.eval()(branch) is branch
    with pytest.raises(ValueError, match=r'drop_prob must be in \[0, 1\), got 1'):
        DropPath(1)


def test_autocast_chooses_its_tokens_in_float32() -> None:
    model, image = build(), images(1, 3, 96, 96)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        levels = model(image)
        stages, _ = model.forward_stages(image)
    assert levels[0].pos.dtype == torch.float32
    assert stages[0].importance.dtype == torch.float32
    for level in levels:
        assert level.feat.isfinite().all()
    assert model.double()(image.double())[3].feat.dtype == torch.float64


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    model = build(out_type='avg')
    image = images(1, 3, 64, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(image)[0], model(image)[0])


def test_reads_nothing_back_from_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors of the meta device have no content: whatever asks for one (and so would wait for a device) fails.
    autocast = torch.autocast
    monkeypatch.setattr(torch, 'autocast', lambda device_type, **kwargs: autocast('cpu', **kwargs))
    with torch.device('meta'):
        model, image = AFF(**SMALL, layer_scale=0.1), torch.empty(2, 3, 61, 94)
    levels = model(image)
    assert [level.feat.shape[1] for level in levels] == [16 * 24, 96, 24, 6]
    sum(level.feat.sum() for level in levels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = AFF('mini', layer_scale=1e-5)
    model.init_weights()
    weight = model.layers[3].blocks[0].mlp.fc1.weight.detach()
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert not model.layers[3].blocks[0].mlp.fc1.bias.any()
    assert (model.layers[2].blocks[1].gamma1 == 1e-5).all()
    assert model.layers[3].blocks[0].attn.blank_k.detach().std() == pytest.approx(1, rel=0.15)
    assert model.patch_embed.proj2.weight.abs().max() <= (1 / (16 * 9)) ** 0.5


def test_weights_of_another_variant_are_named(tmp_path) -> None:
    model = AFF('mini')
    path = str(tmp_path / 'mini.pth')
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in model.state_dict().items()}}, path)
    pretrained = {'type': 'Pretrained', 'checkpoint': path, 'prefix': 'backbone.'}
    same = MMENGINE_MODELS.build({'type': 'boltz_mm.AFF', 'arch': 'mini_1_5th', 'init_cfg': pretrained})
    same.init_weights()
    assert torch.equal(same.norm2.weight, model.norm2.weight)
    assert torch.equal(same.layers[1].blocks[1].attn.q.weight, model.layers[1].blocks[1].attn.q.weight)
    other = MMENGINE_MODELS.build({'type': 'boltz_mm.AFF', 'arch': 'tiny', 'init_cfg': pretrained})
    with pytest.raises(
        ValueError, match=r'weights are of AFF mini or mini_1_5th \(.*the model is AFF tiny or tiny_1_5'
    ):
        other.init_weights()
    own = build().state_dict()
    assert str(layout_of_weights(own)).startswith(
        'no published variant (embed_dims=[8, 12, 16, 24], depths=[1, 2, 1, 1]'
    )
    assert layout_of_weights({'norm0.weight': own['norm0.weight']}) is None


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'arch': 'huge'}, "arch must be a dict or one of mini, .*; got 'huge'"),
        ({'arch': {'embed_dims': (8, 8), 'depth': 3}}, r"missing: \['depths', 'num_heads'\], unknown: \['depth'\]"),
        ({'arch': {**ARCH, 'depths': (1, 1)}}, 'depths must have one entry for each of 4 stages'),
        ({'nbhd_size': (8, 8)}, 'nbhd_size must have one entry for each of 4 stages'),
        ({'nbhd_size': 1}, 'nbhd_size 1 is less than one cluster of cluster_size 4'),
        ({'out_type': 'map'}, "out_type must be 'points' or 'avg', got 'map'"),
        ({'out_indices': (1, 4)}, r'out_indices must be stages 0 to 3, got \(1, 4\)'),
        ({'frozen_stages': 5}, 'frozen_stages must be -1 to 4, got 5'),
        ({'max_offset': 'all'}, "max_offset must be a number, None or 'official', got 'all'"),
        ({'ds_rate': 1.5}, r'ds_rate must be in \(0, 1\], got 1.5'),
        ({'arch': {**ARCH, 'num_heads': (3, 3, 2, 4)}}, 'embed_dims 8 is not a multiple of num_heads 3'),
    ],
)
def test_settings_are_checked(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AFF(**{**SMALL, **kwargs})


def test_official_differences_of_classifier_and_segmentor() -> None:
    classifier, levels = AFF(**SMALL, out_type='avg'), AFF(**SMALL, out_indices=(1, 3))
    assert (classifier.patch_embed.pad_to_stride, levels.patch_embed.pad_to_stride) == (False, True)
    attention = [model.layers[0].blocks[0].attn for model in (classifier, levels)]
    assert [layer.max_offset for layer in attention] == [None, 511]
    assert levels.layers[0].downsample.max_offset == 511
    assert [key for key in levels.state_dict() if key.startswith('norm')] == [
        'norm1.weight', 'norm1.bias', 'norm3.weight', 'norm3.bias'
    ]  # fmt: skip
    assert isinstance(classifier.norm, nn.LayerNorm)
    assert len(levels(images(1, 3, 40, 40))) == 2
    (pooled,) = classifier(images(2, 3, 40, 40))
    assert pooled.shape == (2, 24)
