"""Clusters along a curve: the rule and its roundings, the curves, what the official code cannot do, and PyTorch."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from boltz_mm.ops import Clusters, space_filling_clusters, use_backend
from boltz_mm.ops.clustering import anchor_grid, curve_values, space_filling_keys
from tests.ops.point_cases import adaptive, grid, shuffled

CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
CURVES = ('scan', 'peano', 'hilbert')


def scan_keys(pos: Tensor, cluster_size: int, height: int, width: int, fused: bool = False) -> np.ndarray:
    """The rule for rows to and fro, token by token in numpy; ``fused`` leaves out the rounding of products."""
    rows, columns = anchor_grid(pos.shape[1], cluster_size, height, width, 'scan')
    size = np.array([width / columns, height / rows], np.float32)
    half = np.float32(0.5)
    path = [(x if y % 2 == 0 else columns - 1 - x, y) for y in range(rows) for x in range(columns)]
    centres = [np.array(cell, np.float32) * size + size / 2 - half for cell in path]
    before = [centres[0] - (centres[1] - centres[0]), *centres[:-1]]
    after = [*centres[1:], centres[-1] + (centres[-1] - centres[-2])]
    place = {cell: index for index, cell in enumerate(path)}

    def squared(offset: np.ndarray) -> np.float32:
        return offset[0] * offset[0] + offset[1] * offset[1]

    ranks, ratios = np.empty(pos.shape[:2], np.float32), np.empty(pos.shape[:2], np.float32)
    for index in np.ndindex(pos.shape[:2]):
        at = pos.numpy()[index]
        x, y = np.floor(at / size)
        rank = place[int(x), int(y)]
        ranks[index] = rank
        ratios[index] = squared(at - before[rank]) / (squared(at - after[rank]) + np.float32(1e-5))
    scale = ratios.max() + np.float32(1)
    if fused:  # exact in float64, rounded once
        return (ranks.astype(np.float64) * np.float64(scale) + ratios.astype(np.float64)).astype(np.float32)
    return ranks * scale + ratios


@pytest.mark.parametrize(
    ('pos', 'cluster_size', 'canvas'),
    [
        (grid(56, 56), 8, (56, 56)),
        (shuffled(adaptive(40, 56, 0.25, batch=2)), 8, (40, 56)),
        (shuffled(adaptive(33, 20, 0.3, batch=2)), 24, (33, 20)),
        (grid(30, 17) + 0.3, 7, (31, 18)),
    ],
    ids=['grid', 'adaptive', 'large_clusters', 'off_grid'],
)
def test_equals_the_rule(pos: Tensor, cluster_size: int, canvas: tuple[int, int], backend: str) -> None:
    keys = scan_keys(pos, cluster_size, *canvas)
    assert np.array_equal(space_filling_keys(pos, cluster_size, canvas).numpy(), keys)
    order = torch.from_numpy(np.argsort(keys, axis=1, kind='stable'))
    assert torch.equal(space_filling_clusters(pos, cluster_size, canvas).order, order)


def test_a_fused_key_would_show(backend: str) -> None:
    pos = grid(64, 72)
    orders = [
        torch.from_numpy(np.argsort(scan_keys(pos, 8, 64, 72, fused), axis=1, kind='stable')) for fused in (False, True)
    ]
    assert not torch.equal(*orders)
    assert torch.equal(space_filling_clusters(pos, 8, (64, 72)).order, orders[0])


def test_largest_ratio_of_the_batch_or_of_each_image(backend: str) -> None:
    pos = shuffled(adaptive(40, 48, 0.25, batch=3))
    together, apart = (space_filling_keys(pos, 8, (40, 48), per_image=per_image) for per_image in (False, True))
    alone = [space_filling_keys(image[None], 8, (40, 48)) for image in pos]
    assert torch.equal(apart, torch.cat(alone))
    assert not torch.equal(together, apart)
    order = space_filling_clusters(pos, 8, (40, 48), per_image=True).order
    assert torch.equal(order, torch.cat([space_filling_clusters(image[None], 8, (40, 48)).order for image in pos]))
    assert torch.equal(
        space_filling_clusters(pos, 8, (40, 48)).order, together.argsort(dim=1, stable=True)
    )  # the order of this backend, the keys of the rule


def check_consistent(clusters: Clusters, pos: Tensor, cluster_size: int) -> None:
    """Index, mask, positions and means belong together."""
    batch, tokens = pos.shape[:2]
    count = -(-tokens // cluster_size)
    assert clusters.index.shape == (batch, count, cluster_size)
    mask = torch.ones_like(clusters.index) if clusters.mask is None else clusters.mask
    assert (clusters.mask is None) == (count * cluster_size == tokens)
    assert int(mask.sum()) == batch * tokens
    assert not clusters.index[mask == 0].any()
    members = clusters.pos.gather(1, clusters.index.view(batch, -1, 1).expand(-1, -1, 2)).unflatten(1, (count, -1))
    sums, sizes = (members.double() * mask[..., None]).sum(2), mask.sum(2)
    torch.testing.assert_close(clusters.means.double(), sums / sizes[..., None], rtol=1e-6, atol=1e-6)
    assert torch.equal(clusters.order.sort(1).values, torch.arange(tokens).expand(batch, -1))


@pytest.mark.parametrize(('tokens', 'cluster_size'), [(64, 8), (61, 8), (61, 24), (5, 8), (1, 3)])
def test_members_mask_and_means(tokens: int, cluster_size: int, backend: str) -> None:
    pos = shuffled(grid(12, 10).expand(2, -1, -1))[:, :tokens]
    sorted_clusters = space_filling_clusters(pos, cluster_size, (12, 10))
    check_consistent(sorted_clusters, pos, cluster_size)
    assert torch.equal(sorted_clusters.pos, pos.gather(1, sorted_clusters.order[..., None].expand(-1, -1, 2)))
    left = space_filling_clusters(pos, cluster_size, (12, 10), reorder=False)
    check_consistent(left, pos, cluster_size)
    assert torch.equal(left.pos, pos)
    assert torch.equal(left.means, sorted_clusters.means)
    assert torch.equal(left.index.flatten(1)[:, :tokens], sorted_clusters.order)


@pytest.mark.parametrize('curve', CURVES)
@pytest.mark.parametrize('canvas', [(9, 9), (8, 8), (9, 27), (8, 24), (8, 32), (27, 9)])
def test_curves_visit_every_cell_once(curve: str, canvas: tuple[int, int]) -> None:
    """And step by step where the canvas is made for the curve: wide Hilbert curves too, which have no official form."""
    cells = grid(*canvas)[0]
    values = curve_values(cells, *canvas, curve)
    assert values.unique().numel() == len(cells)
    base = {'scan': 1, 'peano': 3, 'hilbert': 8}[curve]
    if all(side % base == 0 for side in canvas) and (curve != 'hilbert' or canvas[0] == 8):
        path = cells[values.argsort()]
        assert (path[1:] - path[:-1]).abs().sum(-1).max() == 1


@pytest.mark.parametrize('curve', CURVES)
def test_native_curves_are_those_of_the_reference(curve: str, native: None) -> None:
    """Directly and through anchors, on canvases that are not made for the curve, wide and tall ones too."""
    for height, width in itertools.product((1, 2, 5, 12, 31), (1, 3, 10, 26, 67)):
        pos = shuffled(grid(height, width))
        for anchors in (False, True):
            with use_backend('reference'):
                expected = space_filling_clusters(pos, 5, (height, width), curve=curve, anchors=anchors)
            ours = space_filling_clusters(pos, 5, (height, width), curve=curve, anchors=anchors)
            assert torch.equal(ours.order, expected.order), (height, width, anchors)
            assert torch.equal(ours.means, expected.means)


@pytest.mark.parametrize(
    ('pos', 'cluster_size', 'canvas'), [(grid(4, 4), 8, (4, 4)), (grid(1, 40), 8, (1, 40)), (grid(2, 2), 5, (2, 2))]
)
def test_few_cells_fall_back_to_the_curve_itself(
    pos: Tensor, cluster_size: int, canvas: tuple[int, int], backend: str
) -> None:
    with_anchors = space_filling_clusters(pos, cluster_size, canvas)
    direct = space_filling_clusters(pos, cluster_size, canvas, anchors=False)
    for ours, expected in zip(with_anchors, direct, strict=True):
        assert (ours is None and expected is None) or torch.equal(ours, expected)
    x, y = direct.pos[0].unbind(-1)
    assert torch.equal(y * canvas[1] + torch.where(y % 2 == 0, x, canvas[1] - 1 - x), torch.arange(len(x)).float())


def test_dtypes_and_strides(backend: str) -> None:
    pos = adaptive(24, 20, 0.3, batch=2)
    expected = space_filling_clusters(pos, 8, (24, 20))
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.int32):
        strided = pos.to(dtype).permute(2, 0, 1).contiguous().permute(1, 2, 0)
        ours = space_filling_clusters(strided, 8, (24, 20))
        assert torch.equal(ours.order, expected.order)
        assert ours.pos.dtype == torch.float32


def test_empty(backend: str) -> None:
    clusters = space_filling_clusters(torch.zeros(2, 0, 2), 8, (4, 4))
    assert clusters.order.shape == (2, 0)
    assert clusters.means.shape == (2, 0, 2)
    assert space_filling_clusters(torch.zeros(0, 20, 2), 8, (9, 9)).index.shape == (0, 3, 8)


def test_errors(backend: str) -> None:
    good = grid(4, 6)
    with pytest.raises(ValueError, match='cluster_size must be at least 1, got 0'):
        space_filling_clusters(good, 0, (4, 6))
    with pytest.raises(ValueError, match="curve must be one of .*, got 'spiral'"):
        space_filling_clusters(good, 8, (4, 6), curve='spiral')
    with pytest.raises(ValueError, match=r'canvas.*got \(4, 0\)'):
        space_filling_clusters(good, 8, (4, 0))
    with pytest.raises(TypeError, match='pos must be'):
        space_filling_clusters(good.bool(), 8, (4, 6))
    for wrong in (good - 1, good + 1, good * torch.nan):
        with pytest.raises(RuntimeError, match='pos must lie on the canvas, 0 <= x < 6 and 0 <= y < 4'):
            space_filling_clusters(wrong, 8, (4, 6))


def test_threads_do_not_matter(native: None, threads: None) -> None:
    pos = shuffled(adaptive(64, 48, 0.25, batch=3))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(space_filling_clusters(pos, 8, (64, 48)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[:4], results[0][:4], strict=True))


@pytest.mark.parametrize(('curve', 'anchors', 'per_image'), [(0, True, False), (2, False, True)])
def test_opcheck(curve: int, anchors: bool, per_image: bool, native: None) -> None:
    arguments = (adaptive(9, 10, 0.5, batch=2), 8, 9, 10, curve, anchors, per_image)
    torch.library.opcheck(torch.ops.boltz_mm.space_filling_order.default, arguments, test_utils=CHECKS)


def test_compiles_once_for_two_sizes_and_exports(native: None) -> None:
    def model(image: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        return space_filling_clusters(pos, 8, (image.shape[0], image.shape[1]))[:4]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for height, width, tokens in ((9, 12, 90), (11, 14, 101)):
        arguments = (torch.zeros(height, width), shuffled(grid(height, width))[:, :tokens])
        for ours, expected in zip(compiled(*arguments), model(*arguments), strict=True):
            assert torch.equal(ours, expected)
    assert counter.frame_count == 1

    class Module(torch.nn.Module):
        def forward(self, pos: Tensor) -> tuple[Tensor, ...]:
            return space_filling_clusters(pos, 8, (12, 10))[:4]

    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(Module(), (grid(12, 10).expand(3, -1, -1),), dynamic_shapes=({0: batch},))
    other = shuffled(grid(12, 10).expand(2, -1, -1))
    for ours, expected in zip(exported.module()(other), Module()(other), strict=True):
        assert torch.equal(ours, expected)
