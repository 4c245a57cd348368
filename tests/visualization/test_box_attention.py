"""What is recorded is what the attentions use, and the picture shows it."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from torch import nn

from boltz_mm.models.layers.box_attention import BoxAttention, InstanceAttention
from boltz_mm.visualization.box_attention import (
    Attended,
    BoxAttentionView,
    best_queries,
    draw_box_attention,
    record_attention,
    view_attention,
)

SHAPES = [(6, 8), (3, 4)]
TOKENS = 60


def _randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)


@pytest.mark.parametrize('kind', [BoxAttention, InstanceAttention])
def test_recording_changes_nothing_and_ends(kind: type) -> None:
    torch.manual_seed(0)
    attention = kind(embed_dims=16, num_levels=2, num_heads=4)
    _randomise(attention)
    query, value, windows = torch.randn(2, 5, 16), torch.randn(2, TOKENS, 16), torch.rand(1, 5, 4)
    expected = attention(query, value, SHAPES, windows.expand(2, -1, -1))
    with record_attention([attention]) as (records,):
        result = attention(query, value, SHAPES, windows.expand(2, -1, -1))
        attention(query[:, :2], value, SHAPES, windows[:, :2].expand(2, -1, -1))
    assert 'attend' not in vars(attention)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(records) == 2, 'one entry for each image, of the first call alone'
    for image, record in enumerate(records):
        torch.testing.assert_close(record.windows, windows[0])
        torch.testing.assert_close(record.boxes, attention.predict_boxes(query, windows.expand(2, -1, -1))[image])
        assert record.weights.shape == (5, 4, 2)
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(5, 4))


def test_recording_ends_after_an_error() -> None:
    attention = BoxAttention(embed_dims=16, num_levels=2, num_heads=4)
    with pytest.raises(RuntimeError, match='stop'), record_attention([attention]):
        raise RuntimeError('stop')
    assert 'attend' not in vars(attention)


def _view(queries: int = 4) -> BoxAttentionView:
    generator = torch.Generator().manual_seed(1)
    windows = torch.rand(TOKENS, 4, generator=generator) * 0.5 + 0.2
    boxes = windows[:, None, None] + torch.randn(TOKENS, 3, 2, 4, generator=generator) * 0.05
    weights = torch.rand(TOKENS, 3, 2, generator=generator).softmax(-1)
    layer = Attended(windows, boxes, weights)
    asked = Attended(windows[:queries], boxes[:queries], weights[:queries])
    return BoxAttentionView(
        encoder=[layer],
        decoder=[asked, asked],
        tokens=torch.tensor([50, 3, 7, 59])[:queries],
        token_levels=torch.tensor([0] * 48 + [1] * 12),
        scores=torch.tensor([0.2, 0.9, 0.8, 0.5])[:queries],
        labels=torch.tensor([0, 1, 1, 0])[:queries],
        bboxes=torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2], [0.8, 0.3, 0.1, 0.2]]),
    )


def test_best_queries_are_of_different_objects() -> None:
    assert best_queries(_view(), 3) == [1, 3, 0]
    assert best_queries(_view(), 2, least_distance=0.0) == [1, 2]
    assert best_queries(_view(), 9) == [1, 3, 0]


def test_picture_holds_windows_and_boxes(tmp_path) -> None:
    image = np.zeros((30, 40, 3), np.uint8)
    figure = draw_box_attention(image, _view(), [1, 0], classes=['circle', 'square'])
    assert len(figure.axes) == 6
    whole, encoder, decoder = figure.axes[:3]
    assert whole.get_xlim() == (-0.5, 39.5)
    assert 'level 0' in encoder.get_title()
    assert 'query 1, square 0.90' in decoder.get_title()
    assert 'level 1' in figure.axes[4].get_title()
    rectangles = [p for p in encoder.patches if isinstance(p, Rectangle)]
    assert len(rectangles) == 3 * 2 + 2, 'each head and level, and the window twice'
    window = rectangles[-1]
    cx, cy, w, h = _view().encoder[0].windows[3].tolist()
    assert window.get_x() == pytest.approx((cx - w / 2) * 40 - 0.5)
    assert window.get_height() == pytest.approx(h * 30)
    figure.savefig(tmp_path / 'picture.png')


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [({'queries': []}, 'no query'), ({'queries': [0], 'encoder_layer': 1}, 'encoder has 1 layers')],
)
def test_nothing_to_draw(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw_box_attention(np.zeros((8, 8, 3), np.uint8), _view(), **arguments)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match='Linear'):
        view_attention(nn.Linear(2, 2), torch.zeros(1, 3, 8, 8), [])
