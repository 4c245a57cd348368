"""What the CUDA operators promise where the CPU's raise; run by ``test_point_deform_emulated.py`` alone."""

import pytest
import torch
from torch.testing import assert_close

from tests.ops.point_deform_cases import interpolation, make_case, run_interpolation


@pytest.mark.parametrize('bad', [-1, 12, 2**40])
def test_a_number_that_is_no_token_counts_as_no_neighbour(bad: int) -> None:
    case, fewer = make_case(points=4), make_case(points=4)
    case.tables[:, 1, :, 3] = bad
    case.tables[:, 0, :, 3] = 7
    fewer.tables = fewer.tables[..., :3]
    for ours, expected in zip(case.run(), fewer.run(), strict=True):
        assert_close(ours, expected)
    given = interpolation()
    less = given | dict(index=given['index'][..., :3])
    given['index'][..., 3] = max(bad, -(2**31))
    for ours, expected in zip(run_interpolation(given), run_interpolation(less), strict=True):
        assert_close(ours, expected)


def test_a_level_without_tokens_adds_nothing() -> None:
    case = make_case(sizes=(7, 12))
    case.tables[:] = torch.iinfo(torch.int64).max
    assert all(not result.any() for result in case.run())
