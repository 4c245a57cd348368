"""``offset_features``."""

import pytest
import torch

from boltz_mm import ops


def test_offset_features_are_those_of_the_offset() -> None:
    expected = [[3, 4, 5, 0.8, 0.6], [0, -2, 2, -1, 0], [0, 0, 0, 0, 0]]
    offset = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(ops.offset_features(offset), torch.tensor(expected))
    assert ops.offset_features(offset.long()).dtype == torch.float32
    # 300 squared is beyond float16.
    torch.testing.assert_close(
        ops.offset_features(torch.tensor([300.0, 400.0], dtype=torch.float16)),
        torch.tensor([300, 400, 500, 0.8, 0.6], dtype=torch.float16),
    )
    assert ops.offset_features(torch.zeros(2, 0, 2)).shape == (2, 0, 5)


def test_offset_features_have_a_gradient_everywhere() -> None:
    offset = torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.offset_features, offset)
    at_zero = torch.zeros(1, 2, requires_grad=True)
    ops.offset_features(at_zero)[..., :3].sum().backward()
    assert at_zero.grad.tolist() == [[1, 1]]
    with torch.no_grad():
        assert ops.offset_features(torch.tensor([float('nan'), 1.0]))[2:].isnan().all()


def test_offset_features_refuse_what_is_no_offset() -> None:
    with pytest.raises(ValueError, match=r'\[4, 3\]'):
        ops.offset_features(torch.zeros(4, 3))
    with pytest.raises(TypeError, match='bool'):
        ops.offset_features(torch.zeros(4, 2, dtype=torch.bool))
