"""Official BoxeR-3D weights: containers, names, reports, the way back, the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boltz_mm.converters.boxer3d import convert_boxer3d, export_boxer3d, infer_boxer3d_config, our_key
from boltz_mm.registry import MODELS

GOLDEN = Path(__file__).parents[1] / 'data' / 'parity' / 'boxer'
RANGE = dict(voxel_size=[0.5, 0.5, 8.0], point_cloud_range=[-6.0, -6.0, -3.0, 6.0, 6.0, 5.0])


@pytest.fixture(scope='module')
def container() -> dict:
    return torch.load(GOLDEN / 'boxer3d' / 'weights.pth', weights_only=True)


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_container_gives_the_same_weights(container: dict) -> None:
    wanted, report = convert_boxer3d(container)
    assert report.complete
    assert report.num_classes == 5
    assert len(wanted) == len(container['model'])
    bare = container['model']
    prefixed = {f'module.{key}': value for key, value in bare.items()}
    for other in (bare, prefixed, {'model': prefixed}, {'state_dict': bare}):
        assert _same(convert_boxer3d(other)[0], wanted)


def test_a_model_is_inferred_from_the_weights(container: dict) -> None:
    state, _ = convert_boxer3d(container)
    model = MODELS.build(infer_boxer3d_config(state, **RANGE))
    _, report = convert_boxer3d(container, model)
    assert report.complete
    model.load_state_dict(state)
    assert len(model.encoder.layers) == 1
    assert len(model.decoder.layers) == 2
    assert [len(stage) for stage in model.backbone.stages] == [1, 2, 1]
    assert model.bbox_head.num_classes == 5
    assert [layer.linear.out_features for layer in model.backbone.reader.pfn_layers] == [4, 16]


def test_exported_weights_are_the_official_ones(container: dict) -> None:
    state, _ = convert_boxer3d(container)
    assert _same(export_boxer3d(state), container['model'])
    with pytest.raises(ValueError, match="'bbox_head.scale' has no place"):
        export_boxer3d({**state, 'bbox_head.scale': torch.ones(1)})


def test_report_names_what_does_not_fit(container: dict) -> None:
    model = MODELS.build(infer_boxer3d_config(convert_boxer3d(container)[0], **RANGE))
    weights = dict(container['model'])
    del weights['transformer.encoder.enc_linear.0.bias']
    weights['detector.class_embed.weight'] = torch.zeros(4, 32)
    weights['detector.mask_embed.weight'] = torch.zeros(1)
    weights['transformer.encoder.layers.7.norm1.bias'] = torch.zeros(32)
    _, report = convert_boxer3d(weights, model)
    assert not report.complete
    assert report.missing == ['encoder.enc_linear.0.bias']
    assert report.mismatched == {'bbox_head.cls_branch.weight': ((4, 32), (5, 32))}
    assert report.unexpected == ['detector.mask_embed.weight', 'transformer.encoder.layers.7.norm1.bias']
    assert report.num_classes == 4


def test_other_files_are_refused() -> None:
    flat = torch.load(GOLDEN / 'boxer2d_det' / 'weights.pth', weights_only=True)
    with pytest.raises(ValueError, match='no weights of a whole BoxeR-3D'):
        convert_boxer3d(flat)
    with pytest.raises(ValueError, match='no weights of a whole BoxeR-3D'):
        convert_boxer3d({})


def test_keys_below_a_prefix_only() -> None:
    assert our_key('detector.class_embed.weight') == 'bbox_head.cls_branch.weight'
    assert our_key('my.detector.class_embed.weight') is None
    assert our_key('input_projX0X1Xweight') is None


def test_command_line_there_and_back(tmp_path: Path, container: dict) -> None:
    tool = Path(__file__).parents[2] / 'tools' / 'model_converters' / 'boxer2mm.py'
    ours, back = tmp_path / 'ours.safetensors', tmp_path / 'back.pth'
    for arguments in ([GOLDEN / 'boxer3d' / 'weights.pth', ours], ['--reverse', ours, back]):
        subprocess.run([sys.executable, str(tool), *map(str, arguments)], check=True, capture_output=True)
    assert _same(torch.load(back, weights_only=True), container['model'])
