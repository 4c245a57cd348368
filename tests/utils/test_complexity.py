"""Operations are counted, on either backend, and nothing slips through."""

import pytest
import torch
from torch import nn

from boltz_mm import ops
from boltz_mm.utils.complexity import count_complexity


def test_matrix_product_and_parameters() -> None:
    linear = nn.Linear(7, 5)
    result = count_complexity(linear, lambda: linear(torch.zeros(3, 7)))
    assert result.macs == 3 * 7 * 5
    assert result.flops == 2 * result.macs
    assert result.params == 7 * 5 + 5


def test_inference_path_of_attention_is_counted() -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.zeros(2, 10, 16)
    result = count_complexity(attention, lambda: attention(x, x, x, need_weights=False))
    projections, products = 4 * 2 * 10 * 16 * 16, 2 * 2 * 10 * 10 * 16
    assert result.macs == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize('backend', ops.available_backends())
@pytest.mark.parametrize('name', ['box', 'instance'])
def test_our_operators_count_alike_on_both_backends(backend: str, name: str) -> None:
    value, boxes = torch.rand(2, 60, 4, 8), torch.rand(2, 5, 4, 2, 4)
    size = 2 if name == 'box' else 4
    logits = torch.rand(2, 5, 4, 2, 4) if name == 'box' else torch.rand(2, 5, 4, 2, 2, 2)
    arguments = (value, [(6, 8), (3, 4)], boxes, logits, ops.grid_points(size))

    def forward() -> torch.Tensor:
        if name == 'box':
            return ops.box_attention(*arguments)
        return ops.instance_attention(*arguments, mask_output=False)

    with ops.use_backend(backend):
        result = count_complexity(nn.Identity(), forward)
    assert result.macs == 4 * (2 * 5 * 4 * 2 * size**2) * 8


def test_nothing_counted() -> None:
    result = count_complexity(nn.Identity(), lambda: None)
    assert (result.flops, result.by_operator, result.params) == (0, {}, 0)
