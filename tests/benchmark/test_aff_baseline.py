"""The gather-based baseline of AutoFocusFormer reaches the numbers of the official code: it is no straw man."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm import ops
from tests.parity.case import Case
from tests.parity.compare import mismatch
from tools.benchmark import aff_attention, aff_models
from tools.benchmark.baselines import cluster_attention as gather
from tools.benchmark.baselines.aff import Level, OfficialAFF
from tools.benchmark.baselines.aff_head import OfficialSegmentor
from tools.benchmark.baselines.bag_attention import bag_attention
from tools.benchmark.dense import DenseLayers

GOLDEN = Path(__file__).parents[1] / 'data' / 'parity' / 'aff'


def hold(case: Case, produced: dict[str, Tensor]) -> None:
    assert set(case.names_to_hold()) <= set(produced)
    for name in case.names_to_hold():
        assert mismatch(produced[name], case.stored[name], case.check[name]) is None, name


def by_place(feat: Tensor, pos: Tensor) -> Level:
    """Tokens in the order of (y, x)."""
    order = (pos[..., 1] * 4096 + pos[..., 0]).argsort(1)[..., None]
    return Level(feat.gather(1, order.expand_as(feat)), pos.gather(1, order.expand_as(pos)))


def gradients(case: Case, model: torch.nn.Module) -> dict[str, Tensor]:
    return {f'grad.param.{name}': p.grad for name, p in model.named_parameters() if p.grad is not None}


def classifier(case: Case) -> OfficialAFF:
    model = OfficialAFF(**case.kwargs)
    model.load_state_dict(case.weights()['model'])
    return model


@pytest.mark.parametrize('name', ['cls_tiny_a_eval', 'cls_tiny_b_eval'])
def test_classifier(name: str) -> None:
    case = Case(GOLDEN / name)
    model = classifier(case).eval()
    handed: list[Level] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: handed.append(by_place(out[1], out[2])))
    with torch.no_grad():
        produced = {'out.logits': model(case.inputs['img'])}
    for i, level in enumerate(handed, 1):
        produced |= {f'out.stage{i}_feat': level.feat, f'out.stage{i}_pos': level.pos}
    hold(case, produced)


@pytest.mark.parametrize('name', ['cls_tiny_a_train', 'cls_tiny_b_train'])
def test_training_step(name: str) -> None:
    case = Case(GOLDEN / name)
    model = classifier(case).train()
    draws: Iterator[Tensor] = iter(case.rand.values())
    logits = model(case.inputs['img'], draws)
    loss = F.cross_entropy(logits, case.inputs['target'], label_smoothing=0.1)
    loss.backward()
    bn = model.patch_embed.bn
    produced = {'out.logits': logits, 'out.loss': loss, **gradients(case, model)}
    hold(case, produced | {'out.bn_running_mean': bn.running_mean, 'out.bn_running_var': bn.running_var})


@pytest.mark.parametrize('name', ['seg_backbone_a', 'seg_backbone_b'])
def test_segmentation_backbone(name: str) -> None:
    case = Case(GOLDEN / name)
    model = OfficialAFF(**case.kwargs)
    weights = case.weights()['model']
    model.load_state_dict({key.removeprefix('backbone.'): value for key, value in weights.items()})
    model.train(case.meta['mode'] == 'train')
    levels, size = model.points(case.inputs['img'])
    produced, total = {'out.spatial_shape': torch.tensor(size)}, torch.zeros(())
    for i, level in enumerate(levels, 2):
        ordered = by_place(*level)
        produced |= {f'out.res{i}': ordered.feat, f'out.res{i}_pos': ordered.pos}
        total = total + (ordered.feat * case.inputs[f'cotangent_res{i}']).sum()
    total.backward()
    hold(case, produced | gradients(case, model))


@pytest.mark.parametrize('name', ['seg_full_a', 'seg_full_b'])
def test_segmentor(name: str) -> None:
    case = Case(GOLDEN / name)
    model = OfficialSegmentor(**case.kwargs)
    model.load_state_dict(case.weights()['model'])
    with torch.no_grad():
        predictions = model.eval()(case.inputs['img'])
    produced = {}
    for i, (logits, masks) in enumerate(predictions):
        produced |= {f'out.pred_logits{i}': logits, f'out.pred_masks{i}': masks}
    hold(case, produced)


OPERATORS = {
    'op_clustenqk': (gather.cluster_qk, ['query', 'key', 'nbhd_idx']),
    'op_clustenav': (gather.cluster_av, ['attn', 'value', 'nbhd_idx']),
    'op_clustenwf': (gather.cluster_wf, ['weights', 'feat', 'nbhd_idx']),
    'op_weighted_gather': (gather.weighted_gather, ['nbhd_idx', 'weights', 'feat']),
    'op_msdetrpc': (gather.weighted_point_sampling, ['nn_idx', 'nn_weight', 'attn', 'value']),
}


@pytest.mark.parametrize('folder', sorted(GOLDEN.glob('op_*')), ids=lambda folder: folder.name)
def test_operators(folder: Path) -> None:
    case = Case(folder)
    function, names = OPERATORS[case.kind]
    leaves = {n: case.inputs[n].requires_grad_() for n in names if case.inputs[n].is_floating_point()}
    out = function(*(case.inputs[name] for name in names))
    grads = torch.autograd.grad(out, list(leaves.values()), case.inputs['cotangent_out'])
    hold(case, {'out.out': out, **{f'grad.{name}': grad for name, grad in zip(leaves, grads, strict=True)}})


@pytest.mark.parametrize('name', ['knn_grid_9nn', 'knn_self_2nn', 'knn_nearest_clusters', 'knn_grid_to_adaptive_4nn'])
def test_neighbours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, 'TILE', 100)  # several tiles
    case = Case(GOLDEN / name)
    before = gather.KNN_TIME.seconds
    index, distance = gather.knn(case.inputs['query'], case.inputs['database'], case.kwargs['k'])
    assert gather.KNN_TIME.seconds > before
    hold(case, {'out.idx': index, 'out.dist': distance})


@pytest.mark.parametrize(
    ('batch', 'tokens', 'seen', 'train'), [(2, 37, 3, True), (1, 30, None, True), (1, 400, 3, False)]
)
def test_bag_attention(batch: int, tokens: int, seen: int | None, train: bool) -> None:
    torch.manual_seed(0)
    heads, depth, size = 3, 5, 8
    leaves = [torch.randn(batch, tokens, heads, depth) for _ in range(3)]
    leaves += [torch.randn(heads, count) for count in (5, depth, depth)] + [torch.randn(heads)]
    leaves = [leaf.requires_grad_(train) for leaf in leaves]
    pos = torch.randint(0, 9, (batch, tokens, 2)).float()
    nearest = None if seen is None else torch.rand(batch, tokens, -(-tokens // size)).argsort(-1)[..., :seen]

    def attend() -> tuple[Tensor, ...]:
        query, key, value, bias_weight, blank_key, blank_value, bias = leaves
        out = ops.cluster_attention(
            query, key, value, query_pos=pos, key_pos=pos, nearest=nearest, cluster_size=size, scale=0.4,
            bias_weight=bias_weight, bias=bias, blank_key=blank_key, blank_value=blank_value,
        )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out)) if train else ()
        return (out, *grads)

    with torch.set_grad_enabled(train):
        expected = attend()
        with bag_attention():
            produced = attend()
    torch.testing.assert_close(produced, expected, rtol=1e-4, atol=1e-4)


def both_models() -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    arch = {**aff_models.QUICK, 'depths': (1, 2, 1, 1)}
    model, official = aff_models.classifiers(arch, 96, 7)
    return model.eval(), official.eval(), torch.randn(1, 3, 96, 96)


def test_all_sides_compute_the_same() -> None:
    model, official, image = both_models()
    with torch.no_grad():
        expected = official(image)
        ours = model(image)
        with aff_models.best_torch():
            best = model(image)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(best, expected, rtol=1e-4, atol=1e-4)


def test_dense_layers_are_recorded() -> None:
    model, _, image = both_models()
    with DenseLayers(model) as dense:
        aff_models.inference(model, image)()
    names = [call[0]._schema.name.removeprefix('aten::') for call in dense.calls]
    assert names.count('addmm') == 5 * 5 + 3 * 2 + 1, 'q, kv, proj and MLP of 5 blocks, 3 reductions, head'
    assert names.count('native_layer_norm') == 1 + 5 * 2 + 3 + 1
    assert names.count('gelu') == 1 + 5
    assert sum('convolution' in name for name in names) == 2
    with torch.profiler.profile() as profiler:
        dense.run()
    assert sum(event.count for event in profiler.key_averages() if event.key == 'aten::addmm') == names.count('addmm')


@pytest.mark.parametrize('form', [aff_attention.elementwise, aff_attention.matrix_products, aff_attention.torch_bags])
def test_forms_of_one_attention(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 5).unbind()
    bias = torch.randn(2, 3, 20, 7)
    dense = torch.full((2, 3, 20, 20), -torch.inf)
    index = torch.rand(2, 20, 20).argsort(-1)[..., :7]  # none twice
    dense.scatter_(3, index.unsqueeze(1).expand(-1, 3, -1, -1), bias)
    expected = (query @ key.transpose(2, 3) + dense).softmax(-1) @ value
    torch.testing.assert_close(form(query, key, value, index, bias), expected)


@pytest.mark.slow
def test_quick_run_as_json() -> None:
    script = Path(__file__).parents[2] / 'tools' / 'benchmark' / 'models.py'
    names = ['aff_mini', 'aff_mini_seg', 'aff_mini_growth', 'aff_attention']
    command = [sys.executable, str(script), '--model', *names, '--quick', '--repeats', '1', '--json']
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    by_name = {name: [record for record in records if record['model'] == name] for name in names}
    assert [record['direction'] for record in by_name['aff_mini']] == ['fwd'] * 4 + ['fwdbwd'] * 4
    assert [len(by_name[name]) for name in names[1:]] == [4, 12, 8]
    assert sum(map(len, by_name.values())) == len(records)
    for record in records:
        assert record['ratio'] == pytest.approx(record['baseline_ms'] / record['ms'], rel=1e-2)
    for record in by_name['aff_mini']:
        assert ('baseline_extra_bytes' in record) == (not record['baseline'].startswith('dense'))
