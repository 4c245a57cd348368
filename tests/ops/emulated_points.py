"""What the CUDA operators promise where the CPU's raise; run by ``test_cuda_points_emulated.py`` alone."""

import torch

from boltz_mm.ops import knn_points, space_filling_clusters
from tests.ops.point_cases import grid


def test_what_is_not_finite_is_infinitely_far() -> None:
    points = grid(4, 5).clone()
    points[0, 3, 0], points[0, 7, 1] = torch.nan, torch.inf
    query = torch.cat([grid(4, 5), torch.tensor([[[torch.nan, 1], [torch.inf, -torch.inf]]])], 1)
    for canvas in (None, (4, 5)):
        index, distance = knn_points(query, points, 20, return_distance=True, canvas=canvas)
        assert index[0, :20, 18:].tolist() == [[3, 7]] * 20
        assert distance[0, :20, 18:].isinf().all()
        assert distance[0, :20, :18].isfinite().all()
        assert torch.equal(index[0, 20:], torch.arange(20, device=index.device).expand(2, -1))
        assert distance[0, 20:].isinf().all()


def test_what_is_outside_counts_to_the_nearest_cell() -> None:
    pos = grid(8, 9)
    outside = pos.clone()
    outside[pos == 0] = -5
    outside[..., 0][pos[..., 0] == 8] = torch.inf
    for anchors in (True, False):
        order = space_filling_clusters(pos, 4, (8, 9), anchors=anchors).order
        assert torch.equal(space_filling_clusters(outside, 4, (8, 9), anchors=anchors).order, order)
