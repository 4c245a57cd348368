"""The gather-based baseline of AutoFocusFormer reaches the numbers of the official code: it is no straw man."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.case import Case
from tests.parity.compare import mismatch
from tools.benchmark.baselines import cluster_attention as gather
from tools.benchmark.baselines.aff import Level, OfficialAFF
from tools.benchmark.baselines.aff_head import OfficialSegmentor

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
