"""The baselines that the weighted merge is timed against give the same."""

import pytest
import torch

from tools.benchmark.ops import merge_cases


@pytest.mark.parametrize('baseline', ['gathered rows', 'embedding_bag'])
def test_baselines_equal_the_operator(baseline: str) -> None:
    torch.manual_seed(0)
    cases = list(merge_cases((24,), (16,), 'cpu', torch.float32))
    assert len(cases) == 2
    for case in cases:
        ours, theirs = (function(*case.leaves) for function in (case.ours, case.baselines[baseline]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
