"""The tool that draws and measures the tokens of an AutoFocusFormer."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch

from boltz_mm.apis.build import build_model
from boltz_mm.models.backbones.aff import AFF
from boltz_mm.utils.launch import load_config
from tools.analysis_tools import get_flops, plot_tokens

from ..conftest import Tiny

_CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='boltz_mm.AFF', out_type='avg', arch=dict(
        embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), cluster_size=4, nbhd_size=12)),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
    data_preprocessor=dict(mean=[120, 120, 120], std=[60, 60, 60], to_rgb=True))
test_dataloader = dict(dataset=dict(
    type='CustomDataset', data_root='none', metainfo=dict(classes=('circle', 'square', 'triangle')),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')]))
"""


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[str, str]:
    """Config and random weights."""
    config, checkpoint = tmp_path / 'tokens_run.py', tmp_path / 'weights.pth'
    config.write_text(_CONFIG)
    torch.manual_seed(0)
    model, _ = build_model(load_config(str(config)), device='cpu')
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, checkpoint)
    return str(config), str(checkpoint)


def test_plot_tokens(tiny: Tiny, classifier: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'tokens.png'
    image = str(tiny.data / 'val/000000000001.png')
    plot_tokens.main([image, *classifier, '--out', str(out), '--dpi', '40', '--device', 'cpu'])
    picture = cv2.imread(str(out))
    assert picture.shape[0] > picture.shape[1], 'five rows of three panels'
    assert picture.std() > 10


def test_measure(tiny: Tiny, classifier: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    annotations = str(tiny.data / 'annotations/instances_val.json')
    arguments = [str(tiny.data / 'val'), *classifier, '--annotations', annotations, '--device', 'cpu']
    plot_tokens.main([*arguments, '--most-covered', '1', '--num-images', '2'])
    assert '2 images covered at most 100% by objects' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='not stage 4'):
        plot_tokens.main([*arguments, '--stage', '4', '--most-covered', '1'])
    with pytest.raises(SystemExit, match='the annotation file nothing.json does not exist'):
        plot_tokens.main([*arguments[:3], '--annotations', 'nothing.json'])


def test_get_flops_prints_both_counts(classifier: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ['--shape', '224', '--cfg-options', 'model.backbone.arch=mini', 'model.head.in_channels=384']
    get_flops.main([classifier[0], *options, 'model.head.num_classes=1000'])
    out = capsys.readouterr().out
    assert 'no operators, full tables): 1.0763G' in out
    assert '(6754451)' in out


@pytest.mark.parametrize(
    ('arch', 'img_size', 'published', 'params'),
    [
        ('mini', 224, '1.0763', 6_754_451),
        ('mini_1_5th', 224, '0.7335', 6_754_451),
        ('tiny', 224, '4.0241', 27_020_367),
        ('tiny_1_5th', 224, '2.7406', 27_020_367),
        ('small', 224, '8.1552', 42_612_961),
        ('small_1_5th', 224, '5.6932', 42_612_961),
        ('base', 224, '14.4763', 75_341_075),
        ('base_384', 384, '42.5410', 75_341_075),
    ],
)
def test_published_counts(arch: str, img_size: int, published: str, params: int) -> None:
    with torch.device('meta'):
        backbone = AFF(arch, out_type='avg')
        classifier = torch.nn.Linear(backbone.norm.normalized_shape[0], 1000)
    assert sum(p.numel() for part in (backbone, classifier) for p in part.parameters()) == params
    model = SimpleNamespace(backbone=backbone, head=SimpleNamespace(fc=classifier))
    assert f'{get_flops.published_macs(model, (img_size, img_size)) / 1e9:.4f}' == published
    assert get_flops.published_macs(model, (img_size, 32)) is None
