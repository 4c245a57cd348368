"""Nearest neighbours and clusters on a CUDA device against the same on the CPU."""

import pytest
import torch

from boltz_mm.ops import _backend, knn_points, nearest_clusters, space_filling_clusters
from tests.ops import emulated_points
from tests.ops.point_cases import adaptive, shuffled
from tests.ops.test_neighbors import CASES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]


@pytest.fixture(autouse=True)
def built() -> None:
    if 'cuda' not in _backend._loaded_devices:
        pytest.fail(
            'the CUDA library is not built or does not load: BOLTZ_MM_CUDA=1 python setup.py build_ext --inplace'
        )


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('canvas', [None, (24, 24)])
def test_neighbors(name: str, canvas: tuple[int, int] | None) -> None:
    query, points, k = CASES[name]
    ours = knn_points(query.cuda(), points.cuda(), k, return_distance=True, canvas=canvas)
    for a, b in zip(ours, knn_points(query, points, k, return_distance=True), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize('k', [*range(1, 12), 40])
def test_large_sets_for_every_k(k: int) -> None:
    points = shuffled(adaptive(256, 200, 0.25, batch=2))
    ours = knn_points(points.cuda(), points.cuda(), k, return_distance=True)
    for a, b in zip(ours, knn_points(points, points, k, return_distance=True), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize('curve', ['scan', 'peano', 'hilbert'])
@pytest.mark.parametrize('anchors', [True, False])
@pytest.mark.parametrize('per_image', [True, False])
def test_clusters(curve: str, anchors: bool, per_image: bool) -> None:
    for height, width, share in ((56, 56, 1.0), (128, 72, 0.25), (12, 31, 0.3), (1, 40, 1.0)):
        pos = shuffled(adaptive(height, width, share, batch=3))
        arguments = {'curve': curve, 'anchors': anchors, 'per_image': per_image}
        expected = space_filling_clusters(pos, 8, (height, width), **arguments)
        ours = space_filling_clusters(pos.cuda(), 8, (height, width), **arguments)
        for a, b in zip(ours[:4], expected[:4], strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize('test', [name for name in dir(emulated_points) if name.startswith('test_')])
def test_bad_numbers(test: str) -> None:
    with torch.device('cuda'):
        getattr(emulated_points, test)()


def test_graph_and_streams() -> None:
    """Nothing waits for the device, with and without a canvas."""
    pos = shuffled(adaptive(64, 48, 0.25, batch=2)).cuda()

    def run() -> tuple[torch.Tensor, ...]:
        clusters = space_filling_clusters(pos, 8, (64, 48))
        return (
            *clusters[:4],
            nearest_clusters(clusters.pos, clusters.means, 6),
            knn_points(pos, pos, 2, canvas=(64, 48)),
        )

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
