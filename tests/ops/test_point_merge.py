"""``point_merge``, ``cluster_wf``, ``weighted_gather`` and ``offset_features``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from boltz_mm import ops

KINDS = ('clusters', 'rows', 'all', 'given', 'gather')


@dataclass
class MergeCase:
    """One call: differentiable inputs by name, the neighbours as rows (-1: nothing) and the other arguments."""

    kind: str
    leaves: dict[str, Tensor]
    rows: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def function(self) -> Callable[..., Tensor]:
        """The public operator as a function of the leaves alone."""
        names = list(self.leaves)
        if self.kind == 'given':
            return lambda feat, weights: ops.cluster_wf(weights, feat, self.rows)
        if self.kind == 'gather':
            return lambda feat, weights: ops.weighted_gather(self.rows, weights[..., 0], feat)
        return lambda *leaves: ops.point_merge(**dict(zip(names, leaves, strict=True)), **self.kwargs)

    def run(self, function: Callable[..., Tensor] | None = None) -> tuple[Tensor, ...]:
        """The output, and the gradient of each leaf for a fixed random cotangent."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves.values()]
        output = (function or self.function())(*leaves)
        generator = torch.Generator().manual_seed(7)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        return (output.detach(), *torch.autograd.grad(output, leaves, cotangent))

    def plain(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """The formula with gathers: offsets as given, everything else in ``dtype``."""

        def run(feat: Tensor, *rest: Tensor) -> Tensor:
            batch, _, channels = feat.shape
            rows = self.rows.long().expand(batch, -1, -1)
            image = torch.arange(batch)[:, None, None]
            inside = (rows >= 0).unsqueeze(-1)
            if self.kind in ('given', 'gather'):
                weights = rest[0].to(dtype)
            else:
                weight, bias, scale, shift, *importance = (tensor.to(dtype) for tensor in rest)
                key_pos = self.kwargs['key_pos'].expand(batch, -1, -1)
                offset = (key_pos[image, rows] - self.kwargs['query_pos'].unsqueeze(2)) * self.kwargs.get('sign', 1)
                limit = self.kwargs.get('max_offset', math.inf)
                dx, dy = offset.clamp(-limit, limit).unbind(-1)
                d = torch.hypot(dx, dy)
                five = torch.stack([dx, dy, d, (dy / d).nan_to_num(), (dx / d).nan_to_num()], -1).to(dtype)
                hidden = F.layer_norm(five @ weight.T + bias, scale.shape, scale, shift, self.kwargs.get('eps', 1e-5))
                weights = F.gelu(hidden)
                for p in importance:
                    weights = weights * p[image, rows].unsqueeze(-1)
            neighbours = torch.where(inside, feat.to(dtype)[image, rows], 0)
            result = torch.einsum('bnki,bnkc->bnic', torch.where(inside, weights, 0), neighbours)
            if self.kind == 'given':
                return result
            return result.flatten(2)

        return run


def make_case(
    kind: str,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    rows: int = 11,
    points: int = 5,
    count: int = 2,
    cluster_size: int = 4,
    channels: int = 5,
    inner: int = 3,
    shared: bool = False,
    importance: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> MergeCase:
    """Random inputs; the last cluster is not full, rows repeat and some are never referred to."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(compute)

    leaves = {'feat': normal(batch, rows, channels).to(dtype)}
    placed = 1 if shared else batch
    clusters = -(-rows // cluster_size)
    chosen = torch.randint(0, max(1, clusters), (placed, points, count), generator=generator)
    if rows:
        chosen[:, ::2, -1:] = clusters - 1
    members = (chosen.unsqueeze(-1) * cluster_size + torch.arange(cluster_size)).flatten(2)
    members[members >= rows] = -1
    if kind in ('given', 'gather'):
        leaves['weights'] = normal(batch, points, count, 1 if kind == 'gather' else inner)
        index = torch.randint(0, max(1, rows), (placed, points, count), generator=generator)
        return MergeCase(kind, leaves, index)
    leaves |= {'weight': normal(inner, 5), 'bias': normal(inner)}
    leaves |= {'norm_weight': normal(inner), 'norm_bias': normal(inner)}
    if importance:
        leaves['importance'] = normal(batch, rows).sigmoid()
    kwargs['query_pos'] = (normal(placed, points, 2) * 4).round()
    kwargs['key_pos'] = (normal(placed, rows, 2) * 4).round()
    if kind == 'clusters':
        kwargs |= {'nearest': chosen.int(), 'cluster_size': cluster_size}
    elif kind == 'rows':
        members = torch.where(members >= 0, members, 0)
        kwargs['index'] = members
    else:
        members = torch.arange(rows).expand(1, points, rows)
    return MergeCase(kind, leaves, members, kwargs)


def check(case: MergeCase, tolerance: float = 1e-10) -> None:
    """Output and gradients against gathers in float64."""
    exact = replace(case, leaves={k: v.double() for k, v in case.leaves.items()})
    for ours, expected in zip(case.run(), exact.run(case.plain(torch.float64)), strict=True):
        scale = max(1.0, float(expected.abs().max()) if expected.numel() else 0)
        assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance * scale)


EXTREMES = {
    'usual': {},
    'shared': dict(shared=True),
    'opposite': dict(sign=-1, importance=False, max_offset=3, eps=0.1),
    'one_of_each': dict(batch=1, rows=1, points=1, count=1, channels=1, inner=1, cluster_size=1),
    'inner4': dict(inner=4, channels=64, cluster_size=8, rows=37),
    'inner9': dict(inner=9, channels=33, points=3),
    'wide': dict(channels=1030, inner=4, points=3),
    'many_neighbours': dict(rows=1201, count=40, cluster_size=30, points=3),
    'many_points': dict(rows=150, points=301, cluster_size=1, count=9),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('extreme', EXTREMES)
def test_equals_gathers(kind: str, extreme: str, backend: str) -> None:
    check(make_case(kind, **EXTREMES[extreme]))


@pytest.mark.parametrize('kind', KINDS)
def test_float32(kind: str, backend: str) -> None:
    check(make_case(kind, torch.float32, inner=4, rows=300, points=60, channels=48, cluster_size=8), 3e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_gradcheck(kind: str, backend: str) -> None:
    case = make_case(kind, rows=6, points=3, channels=2, inner=2)
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves.values()]
    assert torch.autograd.gradcheck(case.function(), leaves)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_off(kind: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(kind, dtype, rows=64, points=30, channels=32, inner=4)
    exact = replace(case, leaves={k: v.float() for k, v in case.leaves.items()})
    low, ours = case.run(case.plain(dtype)), case.run()
    assert ours[0].dtype == dtype
    for mine, plain, true in zip(ours, low, exact.run(case.plain(torch.float32)), strict=True):
        assert (mine.float() - true).abs().max() <= 2 * (plain.float() - true).abs().max() + 1e-6


@pytest.mark.parametrize('kind', ['clusters', 'rows', 'given'])
def test_any_strides_and_index_types(kind: str, backend: str) -> None:
    case = make_case(kind, torch.float32)
    plain = case.run()

    def swapped(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor + 99], -1)[..., 0]

    for view in (swapped, spread, lambda tensor: tensor.long() if not tensor.is_floating_point() else tensor):
        leaves = {k: view(v) for k, v in case.leaves.items()}
        kwargs = {k: view(v) if isinstance(v, Tensor) else v for k, v in case.kwargs.items()}
        moved = replace(case, leaves=leaves, kwargs=kwargs, rows=view(case.rows))
        for ours, expected in zip(moved.run(), plain, strict=True):
            assert_close(ours, expected)


EMPTY = [(kind, size) for kind in KINDS for size in ('batch', 'points', 'count', 'channels', 'inner', 'rows')]
EMPTY.remove(('gather', 'inner'))  # it is always 1


@pytest.mark.parametrize(('kind', 'empty'), EMPTY)
def test_empty(kind: str, empty: str, backend: str) -> None:
    sizes = {empty: 0} | ({'count': 0} if empty == 'rows' else {})
    case = make_case(kind, **sizes)
    output, *gradients = case.run()
    assert output.shape[:2] == (sizes.get('batch', 2), sizes.get('points', 5))
    if kind != 'all' or empty != 'count':
        assert not output.any()
        assert not any(gradient.any() for gradient in gradients)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in case.leaves.values()]


@pytest.mark.parametrize('kind', KINDS)
def test_nan_stays_where_it_is_read(kind: str, backend: str) -> None:
    case = make_case(kind, torch.float32, rows=11)
    feat = case.leaves['feat'].clone()
    feat[0, 10] = math.nan
    reads = (case.rows[0] == 10).any(-1)
    output = replace(case, leaves=case.leaves | {'feat': feat}).run()[0]
    assert output[0, reads].isnan().all()
    assert output[0, ~reads].isfinite().all()
    assert output[1].isfinite().all()


def test_missing_members_of_the_last_cluster_are_not_read(backend: str) -> None:
    case = make_case('clusters', torch.float32, rows=9)
    feat = case.leaves['feat'].clone()
    feat[:, 0] = math.nan  # the official padding refers to row 0
    case = replace(case, leaves=case.leaves | {'feat': feat}, kwargs=dict(case.kwargs))
    case.kwargs['nearest'] = torch.full_like(case.kwargs['nearest'], 2)
    results = case.run()
    assert all(result.isfinite().all() for result in results)
    assert not results[1][:, :8].any()


@pytest.mark.parametrize('bad', [-1, 3])
@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
def test_neighbours_out_of_range_are_refused(bad: int, dtype: torch.dtype, backend: str) -> None:
    case = make_case('clusters')
    case.kwargs['nearest'] = case.kwargs['nearest'].to(dtype)
    case.kwargs['nearest'][1, 4, 1] = bad
    with pytest.raises(RuntimeError, match=rf'0 \.\.\. 2, got {bad}'):
        case.run()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(index=torch.zeros(2, 5, 1, dtype=torch.int64)), 'not both'),
        (dict(nearest=torch.zeros(2, 4, 1, dtype=torch.int64)), r'nearest must have shape \[B, N, J\]'),
        (dict(cluster_size=0), 'cluster_size must be positive'),
        (dict(sign=0), 'sign must be 1 or -1'),
        (dict(max_offset=-1.0), 'max_offset must not be negative'),
        (dict(key_pos=torch.zeros(2, 10, 2, dtype=torch.float64)), r'key_pos must have shape \[B, M, 2\]'),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    case = make_case('clusters')
    with pytest.raises(ValueError, match=message):
        replace(case, kwargs=case.kwargs | change).run()
    with pytest.raises(TypeError, match='int32 or int64'):
        replace(case, kwargs=case.kwargs | {'nearest': case.kwargs['nearest'].double()}).run()


def test_offset_features_are_those_of_the_offset() -> None:
    expected = [[3, 4, 5, 0.8, 0.6], [0, -2, 2, -1, 0], [0, 0, 0, 0, 0]]
    offset = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    assert_close(ops.offset_features(offset), torch.tensor(expected))
    assert ops.offset_features(offset.long()).dtype == torch.float32
    # 300 squared is beyond float16.
    low = ops.offset_features(torch.tensor([300.0, 400.0], dtype=torch.float16))
    assert_close(low, torch.tensor([300, 400, 500, 0.8, 0.6], dtype=torch.float16))
    assert ops.offset_features(torch.zeros(2, 0, 2)).shape == (2, 0, 5)


def test_offset_features_have_a_gradient_everywhere() -> None:
    offset = torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.offset_features, offset)
    at_zero = torch.zeros(1, 2, requires_grad=True)
    ops.offset_features(at_zero)[..., :3].sum().backward()
    assert at_zero.grad.tolist() == [[1, 1]]
    assert ops.offset_features(torch.tensor([math.nan, 1.0]))[2:].isnan().all()


def test_offset_features_refuse_what_is_no_offset() -> None:
    with pytest.raises(ValueError, match=r'\[4, 3\]'):
        ops.offset_features(torch.zeros(4, 3))
    with pytest.raises(TypeError, match='bool'):
        ops.offset_features(torch.zeros(4, 2, dtype=torch.bool))
