"""The benchmark of the operators on points: its baselines give the same, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boltz_mm import ops
from tools.benchmark.baselines import cluster_attention as plain
from tools.benchmark.point_sets import adaptive, grid

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(('share', 'k'), [(None, 9), (1 / 4, 2), (1 / 16, 4)])
def test_neighbors(share: float | None, k: int) -> None:
    torch.manual_seed(0)
    points = grid(40, 36) if share is None else adaptive(40, 36, share)
    ours = ops.knn_points(grid(40, 36), points, k, return_distance=True)
    expected = plain.knn(grid(40, 36), points, k)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-6, atol=0)


def test_clusters() -> None:
    torch.manual_seed(0)
    pos = adaptive(40, 36, 1 / 4)
    ours, expected = ops.space_filling_clusters(pos, 8, (40, 36)), plain.space_filling_clusters(pos, 8, 40, 36)
    assert torch.equal(ours.order, expected[0])
    torch.testing.assert_close(ours.means, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('op', ['knn_points', 'space_filling_clusters'])
def test_quick_run_as_json(op: str) -> None:
    done = subprocess.run(
        [sys.executable, 'tools/benchmark/ops.py', '--op', op, '--json', '--quick'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == {'knn_points': 4, 'space_filling_clusters': 2}[op]
    for line in lines:
        assert (line['op'], line['direction'], line['dtype']) == (op, 'fwd', 'float32')
        assert line['ratio'] == pytest.approx(line['baseline_ms'] / line['ms'], rel=1e-3)
