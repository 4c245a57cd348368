"""Nearest neighbours: the rule of ties, roundings, extremes, and the operator inside of PyTorch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from boltz_mm.ops import knn_points, nearest_clusters, nearest_other_distance, use_backend
from tests.ops.point_cases import adaptive, grid, shuffled

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def every_pair(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rule, with numpy's float32: one rounding per operation, a stable sort."""
    offset = query.numpy()[:, :, None] - points.numpy()[:, None]
    with np.errstate(over='ignore', under='ignore'):
        distance = np.sqrt(offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1])
    assert distance.dtype == np.float32
    index = np.argsort(distance, axis=-1, kind='stable')[..., :k]
    return torch.from_numpy(index), torch.from_numpy(np.take_along_axis(distance, index, -1))


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


LINE = random(2, 200, 2) * torch.tensor([1.0, 0])
EDGES = torch.tensor([[[-7.0, 3], [100, 100], [0, -50], [4, 4.5], [1e6, 2]]])
CASES = {
    'grid': (grid(9, 7), grid(9, 7), 9),
    'wide_grid': (grid(3, 60), shuffled(grid(3, 60)), 9),
    'to_adaptive': (grid(48, 40).expand(2, -1, -1), shuffled(adaptive(48, 40, 1 / 16, batch=2)), 4),
    'means': (grid(24, 24), shuffled(grid(24, 24)).view(1, -1, 8, 2).mean(2), 6),
    'all': (random(3, 50, 2), random(3, 77, 2, seed=1), 77),
    'many': (random(1, 40, 2), random(1, 3000, 2, seed=1), 300),
    'duplicates': (random(2, 90, 2).round(), (random(2, 300, 2, seed=1) * 1.5).round(), 50),
    'one_place': (torch.ones(1, 9, 2), torch.ones(1, 40, 2), 40),
    'one_point': (random(2, 9, 2), random(2, 1, 2), 1),
    'line': (LINE, LINE, 5),
    'outside': (EDGES, grid(8, 8), 20),
    'clump_and_far': (random(1, 60, 2), torch.cat([random(1, 500, 2) * 1e-3, EDGES * 1e4], 1), 12),
    'huge': (random(1, 50, 2) * 1e30, random(1, 60, 2, seed=1) * 1e30, 60),
    'overflow': (random(1, 9, 2) * 3e37, random(1, 60, 2, seed=1) * 6e37, 30),
    'tiny': (random(1, 50, 2) * 1e-22, random(1, 60, 2, seed=1) * 1e-22, 60),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_every_pair(name: str, backend: str) -> None:
    query, points, k = CASES[name]
    index, distance = knn_points(query, points, k, return_distance=True)
    expected_index, expected_distance = every_pair(query, points, k)
    assert torch.equal(index, expected_index)
    assert torch.equal(distance, expected_distance)
    assert torch.equal(knn_points(query, points, k, canvas=(24, 24)), index)


def test_ties_of_rounded_roots_take_the_lowest_index(backend: str) -> None:
    """Squares that differ, roots that do not: whoever compares squares takes the second point."""
    points = torch.tensor([[[2901.0, 21.0], [2900.0, 79.0]]])
    index, distance = knn_points(torch.zeros(1, 1, 2), points, 2, return_distance=True)
    squares = points.square().sum(-1)
    assert squares[0, 0] > squares[0, 1]
    assert distance[0, 0, 0] == distance[0, 0, 1]
    assert index.tolist() == [[[0, 1]]]


def test_a_fused_product_would_show(backend: str) -> None:
    """Distances have one rounding per operation; with a fused multiply-add many of these differ."""
    query, points = random(1, 300, 2), random(1, 20, 2, seed=1)
    index, distance = knn_points(query, points, 20, return_distance=True)
    offset = query[:, :, None] - points[0, index]
    x, y = offset.double().unbind(-1)
    fused = (x * x + (y * y).float().double()).float().double().sqrt().float()
    assert (fused != distance).float().mean() > 0.05
    assert torch.equal(distance, every_pair(query, points, 20)[1])


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32])
def test_dtypes_and_strides(dtype: torch.dtype, backend: str) -> None:
    query, points = grid(9, 12).expand(2, -1, -1), adaptive(9, 12, 0.4, batch=2)
    expected = knn_points(query, points, 4, return_distance=True)
    strided = torch.stack([points[..., 1], points[..., 0]])[[1, 0]].to(dtype).permute(1, 2, 0)
    for ours, theirs in zip(knn_points(query.to(dtype), strided, 4, return_distance=True), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_distances_have_no_gradient(backend: str) -> None:
    points = random(1, 9, 2).requires_grad_()
    assert not knn_points(points, points, 3, return_distance=True)[1].requires_grad


def test_empty(backend: str) -> None:
    index, distance = knn_points(torch.zeros(2, 0, 2), torch.zeros(2, 5, 2), 3, return_distance=True)
    assert index.shape == distance.shape == (2, 0, 3)
    assert knn_points(torch.zeros(0, 4, 2), torch.zeros(0, 5, 2), 3).shape == (0, 4, 3)
    assert knn_points(torch.zeros(2, 4, 2), torch.zeros(2, 0, 2), 0).shape == (2, 4, 0)


def test_errors(backend: str) -> None:
    good = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match=r'k must be in 0\.\.4.*got 5'):
        knn_points(good, good, 5)
    with pytest.raises(ValueError, match=r'points must have shape \[B, N, 2\], got \[4, 2\]'):
        knn_points(good, good[0], 1)
    with pytest.raises(ValueError, match='batch of 1, points of 2'):
        knn_points(good, good.expand(2, -1, -1), 1)
    with pytest.raises(ValueError, match=r'canvas.*got \(0, 3\)'):
        knn_points(good, good, 1, canvas=(0, 3))
    with pytest.raises(TypeError, match=r'query must be .*, got torch.bool'):
        knn_points(good.bool(), good, 1)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(RuntimeError, match='points must be finite'):
            knn_points(good, good.index_fill(1, torch.tensor([2]), wrong), 1)
        with pytest.raises(RuntimeError, match='query must be finite'):
            knn_points(good.index_fill(1, torch.tensor([2]), wrong), good, 1)


def test_nearest_clusters_and_other_tokens(backend: str) -> None:
    pos = shuffled(adaptive(32, 24, 0.25, batch=2))
    means = pos.view(2, -1, 8, 2).mean(2)
    nearest = nearest_clusters(pos, means, 6, canvas=(32, 24))
    assert nearest.dtype == torch.int32
    assert torch.equal(nearest.long(), knn_points(pos, means, 6))
    apart = (pos[:, :, None] - pos[:, None]).square().sum(-1).double().sqrt().float()
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    assert torch.equal(nearest_other_distance(pos), apart.amin(-1))
    assert nearest_other_distance(torch.ones(1, 2, 2)).tolist() == [[0, 0]]


def test_threads_do_not_matter(native: None, threads: None) -> None:
    query, points = grid(64, 48).expand(3, -1, -1), adaptive(64, 48, 0.25, batch=3)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(knn_points(query, points, 4, return_distance=True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('capability', ['baseline', 'avx2'])
def test_every_instruction_set_gives_the_same(capability: str, native: None, tmp_path: Path) -> None:
    code = (
        'import sys, torch; from tests.ops.test_neighbors import CASES; from boltz_mm.ops import knn_points; '
        'torch.save({n: knn_points(*case, return_distance=True) for n, case in CASES.items()}, sys.argv[1])'
    )
    environment = {**os.environ, 'BOLTZ_MM_CPU_CAPABILITY': capability, 'BOLTZ_MM_OPS': 'native'}
    path = str(tmp_path / 'results.pt')
    subprocess.run([sys.executable, '-c', code, path], cwd=ROOT, env=environment, check=True, timeout=120)
    for name, found in torch.load(path).items():
        for ours, expected in zip(found, every_pair(*CASES[name]), strict=True):
            assert torch.equal(ours, expected), name


@pytest.mark.parametrize(('long_index', 'distance_needed'), [(True, True), (False, False)])
def test_opcheck(long_index: bool, distance_needed: bool, native: None) -> None:
    arguments = (grid(5, 6), adaptive(5, 6, 0.5), 3, 5, 6, long_index, distance_needed)
    torch.library.opcheck(torch.ops.boltz_mm.knn_points.default, arguments, test_utils=CHECKS)


def test_compiles_once_for_two_sizes_and_exports(native: None) -> None:
    def model(image: Tensor, query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return knn_points(query, points, 4, return_distance=True, canvas=(image.shape[0], image.shape[1]))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in ((9, 12), (11, 14)):
        arguments = (torch.zeros(size), grid(*size), adaptive(*size, 0.4))
        for ours, expected in zip(compiled(*arguments), model(*arguments), strict=True):
            assert torch.equal(ours, expected)
    assert counter.frame_count == 1

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, points: Tensor) -> Tensor:
            return nearest_clusters(query, points, 4)

    count = torch.export.Dim('count', min=8, max=4096)
    exported = torch.export.export(Module(), (grid(9, 12), random(1, 20, 2)), dynamic_shapes=({1: count}, None))
    other = grid(7, 13)
    assert torch.equal(exported.module()(other, random(1, 20, 2)), nearest_clusters(other, random(1, 20, 2), 4))


def test_vmap_folds_into_the_batch(native: None) -> None:
    query, points = random(3, 2, 20, 2), random(3, 2, 30, 2, seed=1)
    mapped = torch.vmap(lambda q, p: knn_points(q, p, 5))(query, points)
    assert torch.equal(mapped, torch.stack([knn_points(q, p, 5) for q, p in zip(query, points, strict=True)]))


@pytest.mark.slow
def test_time_for_a_token_does_not_grow(native: None, threads: None) -> None:
    """Processor time of one thread, which a busy machine disturbs less; a rest of noise is allowed for."""
    torch.set_num_threads(1)
    for k, share in ((9, None), (4, 1 / 16)):
        per_token = []
        for side in (128, 512):
            query = grid(side, side)
            points = query if share is None else adaptive(side, side, share)
            times = []
            for _ in range(5):
                start = time.thread_time()
                knn_points(query, points, k)
                times.append(time.thread_time() - start)
            per_token.append(min(times) / query.shape[1])
        assert per_token[1] <= 1.3 * per_token[0], (k, per_token)


def test_backends_agree_on_large_sets() -> None:
    points = shuffled(adaptive(112, 90, 0.25))
    with use_backend('reference'):
        expected = knn_points(points, points, 7, return_distance=True)
    for ours, theirs in zip(knn_points(points, points, 7, return_distance=True), expected, strict=True):
        assert torch.equal(ours, theirs)
