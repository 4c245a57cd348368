"""Operations are counted, on either backend, and nothing slips through."""

import pytest
import torch
from torch import nn

from boltz_mm import ops
from boltz_mm.utils.complexity import count_complexity, published_aff_macs


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


@pytest.mark.parametrize('backend', ops.available_backends())
def test_weighted_gather_counts_alike_on_both_backends(backend: str) -> None:
    index, weights, feat = torch.zeros(2, 5, 3, dtype=torch.int64), torch.rand(2, 5, 3), torch.rand(2, 7, 4)
    with ops.use_backend(backend):
        result = count_complexity(nn.Identity(), lambda: ops.weighted_gather(index, weights, feat))
    assert result.macs == 2 * 5 * 3 * 4


def test_nothing_counted() -> None:
    result = count_complexity(nn.Identity(), lambda: None)
    assert (result.flops, result.by_operator, result.params) == (0, {}, 0)


MINI = {'embed_dims': (32, 128, 256, 384), 'depths': (2, 2, 6, 2), 'num_heads': (2, 4, 8, 16), 'mlp_ratio': 2}
TINY = {'embed_dims': (64, 128, 256, 512), 'depths': (3, 4, 18, 5), 'num_heads': (2, 4, 8, 16), 'mlp_ratio': 3}
SMALL = {'embed_dims': (96, 192, 384, 768), 'depths': (3, 4, 18, 2), 'num_heads': (3, 6, 12, 24), 'mlp_ratio': 3}
BASE = {'embed_dims': (128, 256, 512, 1024), 'depths': (3, 4, 18, 2), 'num_heads': (4, 8, 16, 32), 'mlp_ratio': 3}


@pytest.mark.parametrize(
    ('arch', 'ds_rate', 'img_size', 'published'),
    [
        (MINI, 0.25, 224, '1.0763'),
        (MINI, 0.2, 224, '0.7335'),
        (TINY, 0.25, 224, '4.0241'),
        (TINY, 0.2, 224, '2.7406'),
        (SMALL, 0.25, 224, '8.1552'),
        (SMALL, 0.2, 224, '5.6932'),
        (BASE, 0.25, 224, '14.4763'),
        (BASE, 0.25, 384, '42.5410'),
    ],
)
def test_published_count_of_autofocusformer(arch: dict, ds_rate: float, img_size: int, published: str) -> None:
    assert f'{published_aff_macs(**arch, ds_rate=ds_rate, img_size=img_size) / 1e9:.4f}' == published
