"""The benchmark of attention and interpolation between points: its baselines give the same."""

import pytest
from torch.testing import assert_close

from boltz_mm.ops import inverse_distance_interpolate
from tests.ops.point_deform_cases import interpolation, make_case
from tools.benchmark import ops as benchmark
from tools.benchmark.baselines import point_deform as plain


def test_baselines_give_the_same() -> None:
    case = make_case(batch=1, power=3.1)
    constants = case.positions, case.sizes, case.tables, case.canvas, case.query_pos
    value, *rest = case.leaves.values()
    assert_close(case.function(value, *rest), plain.attention(value, *constants, *rest))
    given = interpolation(batch=1)
    feat, pos, query, index, _ = given.values()
    assert_close(
        inverse_distance_interpolate(feat, pos, query, index, 3.0), plain.interpolate(feat, pos, query, index, 3)
    )


@pytest.mark.parametrize('op', ['point_deform_attention', 'inverse_distance_interpolate'])
def test_cases_agree_with_their_baselines(op: str) -> None:
    for dtype, case in benchmark.cases(op, 'cpu', quick=True):
        ours = case.ours(*case.leaves)
        for baseline in case.baselines.values():
            low = {'float32': 1e-4, 'bfloat16': 5e-2}[dtype]
            assert_close(ours, baseline(*case.leaves), rtol=low, atol=low)
