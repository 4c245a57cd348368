"""Encoder, proposals and decoder of BoxeR-3D."""

import math

import pytest
import torch
from mmdet.models.layers import inverse_sigmoid
from torch import nn

from boltz_mm.models.layers.box3d_transformer import Box3dTransformerDecoder, Box3dTransformerEncoder
from boltz_mm.models.layers.box_attention import Box3dAttention
from boltz_mm.models.layers.box_position import sine_embedding
from boltz_mm.models.layers.box_transformer import MASKED_LOGIT

WIDTH = 16
LAYER = dict(embed_dims=WIDTH, feedforward_channels=32)
SHAPES = [(6, 5), (3, 2)]
TOKENS = 36


def _encoder(**kwargs: object) -> Box3dTransformerEncoder:
    return Box3dTransformerEncoder(layer_cfg=LAYER | kwargs)


@pytest.mark.parametrize('heads', [1, 4, 16])
def test_encoder_needs_a_head_for_each_anchor_angle(heads: int) -> None:
    with pytest.raises(ValueError, match=f'num_heads of the BoxeR-3D encoder must be 8, .* got {heads}'):
        _encoder(num_heads=heads)


def test_decoder_takes_any_number_of_heads() -> None:
    decoder = Box3dTransformerDecoder(layer_cfg=LAYER | dict(num_heads=4))
    hidden = decoder(
        torch.rand(2, 7, WIDTH), torch.rand(2, 7, WIDTH), torch.rand(2, TOKENS, WIDTH), SHAPES, torch.rand(2, 7, 7)
    ).hidden_states
    assert hidden.shape == (2, 2, 7, WIDTH)


def test_attentions() -> None:
    encoder, decoder = _encoder(), Box3dTransformerDecoder(layer_cfg=LAYER)
    attentions = [layer.self_attn for layer in encoder.layers] + [layer.multihead_attn for layer in decoder.layers]
    assert all(isinstance(attention, Box3dAttention) for attention in attentions)
    assert [attention.with_rotation for attention in attentions] == [False, False, True, True]


def test_windows_and_positions() -> None:
    encoder = _encoder()
    windows, positions = encoder.reference_windows(SHAPES), encoder.position_embedding(SHAPES)
    assert windows.shape == (1, TOKENS, 8, 5)
    assert positions.shape == (1, TOKENS, WIDTH)
    row, column = 4, 3
    window = windows[0, row * 5 + column]
    centre = torch.tensor([(column + 0.5) / 5, (row + 0.5) / 6])
    torch.testing.assert_close(window[:, :4], torch.tensor([*centre, 4 / 5, 4 / 6]).expand(8, 4))
    thirds = torch.tensor([3.0, 5.0, 1.0, 3.0, 5.0, 1.0, 3.0, 6.0]) / 6
    torch.testing.assert_close(window[:, 4], thirds)
    torch.testing.assert_close(positions[0, row * 5 + column], sine_embedding(centre, WIDTH), rtol=1e-4, atol=1e-5)


def _propose(encoder: Box3dTransformerEncoder, count: int, anchors: int = 3) -> tuple:
    torch.manual_seed(0)
    memory = torch.rand(2, TOKENS, WIDTH, requires_grad=True)
    classify, regress = nn.Linear(WIDTH, anchors), nn.Linear(WIDTH, anchors * 7)
    windows = encoder.reference_windows(SHAPES)
    return memory, classify, regress, windows, encoder.select_proposals(memory, windows, classify, regress, count)


@pytest.mark.parametrize('anchors', [1, 3, 8])
def test_proposals_are_the_best_anchors(anchors: int) -> None:
    encoder = _encoder()
    memory, classify, regress, windows, proposals = _propose(encoder, 5, anchors)
    ratings = classify(memory).flatten(1)
    assert proposals.topk_indexes.sort().values.tolist() == ratings.topk(5).indices.sort().values.tolist()
    torch.testing.assert_close(proposals.class_logits.squeeze(-1), ratings)
    for image, index in [(0, 0), (1, 3)]:
        token, anchor = divmod(int(proposals.topk_indexes[image, index]), anchors)
        offset = regress(memory[image, token]).view(anchors, 7)[anchor]
        wanted = torch.cat([offset[:5] + inverse_sigmoid(windows[0, token, anchor]), offset[5:]]).sigmoid()
        torch.testing.assert_close(proposals.ref_windows[image, index], wanted)
        embedded = sum(sine_embedding(wanted[i], WIDTH) for i in ([0, 1], [2, 3], [4, 4]))
        torch.testing.assert_close(proposals.query_pos[image, index], embedded, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(proposals.target[image, index], encoder.enc_linear(memory[image, token]))


def test_proposals_are_detached_and_ratings_are_not() -> None:
    memory, classify, regress, _, proposals = _propose(_encoder(), 5)
    assert not proposals.ref_windows.requires_grad
    assert not proposals.query_pos.requires_grad
    proposals.target.sum().backward()
    assert memory.grad is None
    proposals.class_logits.sum().backward()
    assert bool(memory.grad.any())
    assert regress.weight.grad is None


def test_anchors_at_the_border_come_last() -> None:
    encoder = _encoder()
    memory, classify, regress, _, _ = _propose(encoder, 5)
    shapes = [(1, 1200)]
    windows = encoder.reference_windows(shapes)
    memory = torch.rand(1, 1200, WIDTH)
    proposals = encoder.select_proposals(memory, windows, classify, regress, 3599)
    # 0.5 / 1200 is within 0.001 of the border, 1.5 / 1200 is not.
    bad = (~proposals.usable[0]).nonzero().squeeze(1).tolist()
    assert bad == [0, 1, 2, 3597, 3598, 3599]
    assert proposals.class_logits[0, bad].unique().tolist() == [MASKED_LOGIT]
    assert proposals.topk_indexes.shape == (1, 3599)
    assert bool(proposals.ref_windows.isfinite().all())


def test_fewer_anchors_than_queries() -> None:
    _, _, _, _, proposals = _propose(_encoder(), 1000)
    assert proposals.topk_indexes.shape == (2, TOKENS * 3)


def test_initialisation() -> None:
    encoder, decoder = _encoder(), Box3dTransformerDecoder(layer_cfg=LAYER)
    encoder.init_weights()
    decoder.init_weights()
    for attention in (encoder.layers[1].self_attn, decoder.layers[1].multihead_attn):
        assert not attention.linear_box_weight.any()
        assert not attention.linear_attn_weight.any()
        assert 0 <= attention.linear_box_bias.min() < attention.linear_box_bias.max() < 1
    bound = math.sqrt(6 / (WIDTH + 32))
    weight = encoder.layers[0].linear1.weight
    assert 0.8 * bound < weight.abs().max() <= bound


def test_recomputing_a_layer_gives_the_same_gradients() -> None:
    tokens = torch.rand(2, TOKENS, WIDTH)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        encoder = _encoder(with_cp=with_cp)
        windows, positions = encoder.reference_windows(SHAPES), encoder.position_embedding(SHAPES)
        encoder(tokens, positions, SHAPES, windows).square().sum().backward()
        gradients.append([p.grad for p in encoder.layers.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
