"""The baseline of BoxeR does the official work and reaches the same results as our model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope
from torch import Tensor

from boltz_mm.registry import MODELS
from boltz_mm.utils.register import register_all_modules
from tools.benchmark.baselines.boxer import OfficialBoxeR, paste_full_image


@pytest.fixture(autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')


def build(with_mask: bool, residual_mode: str):
    torch.manual_seed(3)
    layer = dict(embed_dims=32, num_heads=4, num_levels=2, feedforward_channels=24)
    masks = dict(with_mask=True, residual_mode=residual_mode, grid_size=4) if with_mask else {}
    model = MODELS.build(
        dict(
            type='boltz_mm.BoxeR',
            num_queries=9,
            backbone=dict(type='mmdet.ResNet', depth=18, base_channels=8, stem_channels=8, out_indices=(2, 3)),
            neck=dict(
                type='boltz_mm.BoxeRNeck',
                in_channels=[32, 64],
                out_channels=32,
                num_outs=2,
                norm_cfg=dict(type='GN', num_groups=4),
            ),
            encoder=dict(num_layers=1, layer_cfg=layer),
            decoder=dict(num_layers=2, layer_cfg={**layer, **masks}),
            positional_encoding=dict(embed_dims=32),
            bbox_head=dict(type='boltz_mm.BoxeRHead', num_classes=4, embed_dims=32, with_mask=with_mask),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # initial values would make all boxes and masks alike
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        if with_mask:
            model.bbox_head.mask_head.conv_logits.bias.fill_(1.0)
    return model.eval()


def batch() -> tuple[Tensor, list[DetDataSample]]:
    shapes = [(96, 128), (80, 100)]
    samples = [
        DetDataSample(metainfo=dict(img_shape=s, batch_input_shape=(96, 128), ori_shape=s, scale_factor=(1.0, 1.0)))
        for s in shapes
    ]
    return torch.randn(2, 3, 96, 128), samples


@pytest.mark.parametrize('mode', ['evaluation', 'inference'])
@pytest.mark.parametrize(('with_mask', 'residual_mode'), [(False, 'v1'), (True, 'v1'), (True, 'v2')])
def test_same_results(mode: str, with_mask: bool, residual_mode: str) -> None:
    model = build(with_mask, residual_mode)
    inputs, samples = batch()
    with torch.no_grad():
        every = model.forward_all(inputs, samples)
        ours = model.predict(inputs, samples)
        layers = OfficialBoxeR(model, mode)(inputs, samples)
    assert len(layers) == (2 if mode == 'evaluation' else 1)
    for theirs, layer in zip(reversed(layers), (1, 0), strict=False):
        torch.testing.assert_close(theirs.cls_scores, every.cls_scores[layer])
        torch.testing.assert_close(theirs.bbox_preds, every.bbox_preds[layer])
        if with_mask:
            torch.testing.assert_close(theirs.mask_logits, every.mask_logits[layer], rtol=1e-4, atol=1e-4)
    for sample, theirs in zip(ours, OfficialBoxeR(model, mode).predict(inputs, samples), strict=True):
        mine = sample.pred_instances
        order = theirs.scores.argsort(descending=True, stable=True)
        torch.testing.assert_close(mine.scores, theirs.scores[order], rtol=1e-4, atol=1e-5)
        pairs = [set(zip(r.query_inds.tolist(), r.labels.tolist(), strict=True)) for r in (mine, theirs)]
        assert pairs[0] == pairs[1]
        if with_mask:
            area = [sum(r.masks.flatten(1).sum(1).tolist()) for r in (mine, theirs)]
            assert area[0] == pytest.approx(area[1], rel=1e-3)
            assert area[0] > 0


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match='training'):
        OfficialBoxeR(build(False, 'v1'), 'training')


def test_paste_full_image() -> None:
    pasted = paste_full_image(torch.ones(1, 4, 4), torch.tensor([[2.0, 1.0, 6.0, 5.0]]), (8, 9))
    expected = torch.zeros(8, 9)
    expected[1:5, 2:6] = 1
    torch.testing.assert_close(pasted[0] >= 0.5, expected.bool())


@pytest.mark.slow
def test_quick_run_as_json() -> None:
    script = Path(__file__).parents[2] / 'tools' / 'benchmark' / 'models.py'
    command = [sys.executable, str(script), '--model', 'boxer_r50_mask', '--quick', '--repeats', '1', '--json']
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert {record['direction'] for record in records} == {'predict', 'fwdbwd'}
    for record in records:
        assert record['ratio'] == pytest.approx(record['baseline_ms'] / record['ms'], rel=1e-2)
        assert record['extra_bytes'] > 0
