"""Official AutoFocusFormer weights: containers, names, reports, the way back, the command line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from safetensors.torch import load_file

from boltz_mm.converters.aff import (
    convert_aff,
    export_aff,
    infer_aff_arch,
    infer_aff_classifier_config,
    infer_aff_segmentor_config,
    our_segmentor_key,
)
from boltz_mm.models.backbones.aff import AFF

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'data' / 'parity' / 'aff'
SEGMENTOR = {'cluster_size': 4, 'nbhd_size': 12}


def load(case: str) -> dict:
    return torch.load(GOLDEN / case / 'weights.pth', weights_only=True)


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def classifier() -> dict:
    return load('cls_tiny_b_eval')['model']


def test_a_classifier_finds_its_place_and_the_way_back(classifier: dict) -> None:
    state, _ = convert_aff({'model': classifier})
    model = MODELS.build(infer_aff_classifier_config(state, ds_rate=0.2))
    state, report = convert_aff({'model': classifier}, model)
    assert report.complete, str(report)
    assert report.num_classes == 7
    model.load_state_dict(state, strict=True)
    assert_same(export_aff(model.state_dict()), classifier)
    widths = {'embed_dims': [12, 16, 24, 24], 'depths': [1, 1, 2, 1], 'num_heads': [3, 2, 2, 3]}
    assert infer_aff_arch(state) == {**widths, 'mlp_ratio': 3, 'layer_scale': 1e-5}


def test_containers(classifier: dict) -> None:
    wanted = convert_aff(classifier)[0]
    prefixed = {f'module.{key}': value for key, value in classifier.items()}
    averaged = {key: value + 1 for key, value in prefixed.items()}
    training = {'model': classifier, 'model_ema': averaged, 'optimizer': {}, 'max_accuracy': 1.0, 'epoch': 3}
    for container in ({'model': classifier}, {'model': prefixed}, {'state_dict': classifier}, training):
        assert_same(convert_aff(container)[0], wanted)
    assert_same(convert_aff(training, ema=True)[0], {key: value + 1 for key, value in wanted.items()})
    with pytest.raises(ValueError, match=r"no averaged weights 'model_ema'; it has \['model'\]"):
        convert_aff({'model': classifier}, ema=True)
    with pytest.raises(ValueError, match='no weights of AutoFocusFormer among'):
        convert_aff({'model': {'conv1.weight': torch.ones(1)}})


def test_a_classifier_starts_a_segmentor(classifier: dict) -> None:
    state, report = convert_aff({'model': classifier}, backbone_only=True)
    assert report.dropped == ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']
    backbone = AFF(infer_aff_arch(state))
    missing = backbone.load_state_dict({k.removeprefix('backbone.'): v for k, v in state.items()}, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == [f'norm{i}.{name}' for i in range(4) for name in ('weight', 'bias')]
    assert 'left out: head.bias' in str(report)


@pytest.mark.parametrize('case', ['seg_full_a', 'maskformer_e2e_eval'])
def test_a_segmentor_finds_its_place_and_the_way_back(case: str) -> None:
    container = load(case)
    model = MODELS.build(infer_aff_segmentor_config(convert_aff(container)[0], **SEGMENTOR))
    state, report = convert_aff(container, model)
    assert report.complete, str(report)
    model.load_state_dict(state, strict=True)
    exported, official = export_aff(model.state_dict()), dict(container['model'])
    # Not every golden file has the loss's weights; those that do have the official ones.
    official.setdefault('criterion.empty_weight', exported['criterion.empty_weight'])
    assert_same(exported, official)
    for_mmseg, _ = convert_aff(container, head='decode_head')
    segmentor = MODELS.build(infer_aff_segmentor_config(for_mmseg, 'decode_head', **SEGMENTOR))
    segmentor.load_state_dict(for_mmseg, strict=True)
    assert_same(export_aff(for_mmseg), official)
    assert 'decode_head.predictor.class_embed.weight' in for_mmseg
    only, _ = convert_aff(container, backbone_only=True)
    assert {key.split('.')[0] for key in only} == {'backbone'}
    assert 'backbone.norm3.bias' in only


def test_names() -> None:
    old = 'sem_seg_head.predictor.static_query.weight'
    assert our_segmentor_key(old) == 'panoptic_head.predictor.query_feat.weight'
    assert our_segmentor_key('sem_seg_head.other.weight') is None
    assert our_segmentor_key('backbone.stem.weight') is None
    with pytest.raises(ValueError, match="head must be one of panoptic_head, decode_head; got 'neck'"):
        convert_aff({}, head='neck')


def test_what_does_not_fit_is_reported(classifier: dict) -> None:
    model = MODELS.build(infer_aff_classifier_config(convert_aff(classifier)[0]))
    wrong = {**classifier, 'something.else': torch.ones(1), 'head.weight': torch.ones(5, 24)}
    del wrong['layers.0.prob_net.bias']
    _, report = convert_aff(wrong, model)
    assert not report.complete
    assert report.unexpected == ['something.else']
    assert report.missing == ['backbone.layers.0.prob_net.bias']
    assert report.mismatched == {'head.fc.weight': ((5, 24), (7, 24))}
    with pytest.raises(ValueError, match=r"not of a whole model: 'head.fc.weight' is missing"):
        infer_aff_classifier_config(convert_aff(wrong, backbone_only=True)[0])
    with pytest.raises(ValueError, match="'backbone.layers' is missing"):
        infer_aff_arch({'backbone.norm.weight': torch.ones(1)})


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the tool in this process: exit status and what it printed."""

    def run(*arguments):
        tool = ROOT / 'tools' / 'model_converters' / 'aff2mm.py'
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_status:
            runpy.run_path(str(tool), run_name='__main__')
        printed = capsys.readouterr()
        return exit_status.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize('case', ['cls_tiny_a_eval', 'maskformer_e2e_eval'])
@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_command_line_there_and_back(tmp_path: Path, suffix: str, case: str, run_tool) -> None:
    source, ours, back = GOLDEN / case / 'weights.pth', tmp_path / f'ours.{suffix}', tmp_path / 'back.pth'
    status, out, err = run_tool(source, ours)
    assert status == 0, err
    assert 'AFF no published variant (embed_dims=[8, ' in out
    state = load_file(ours) if suffix == 'safetensors' else torch.load(ours, weights_only=True)['state_dict']
    assert state.keys() == convert_aff(load(case))[0].keys()
    assert run_tool('--reverse', ours, back)[0] == 0
    assert_same(torch.load(back, weights_only=True)['model'], load(case)['model'])


def test_command_line_takes_the_backbone_alone(tmp_path: Path, run_tool) -> None:
    for case, norms in (('cls_tiny_a_eval', 0), ('seg_full_a', 8)):
        target = tmp_path / f'{case}.safetensors'
        status, out, err = run_tool('--backbone', GOLDEN / case / 'weights.pth', target)
        assert (status, err) == (0, '')
        assert 'left out: ' in out
        found = [key for key in load_file(target) if key.startswith('backbone.norm')]
        assert len(found) == norms


def test_command_line_serves_mmseg(tmp_path: Path, run_tool) -> None:
    target = tmp_path / 'ours.safetensors'
    status, _, err = run_tool('--framework', 'mmseg', GOLDEN / 'seg_full_a' / 'weights.pth', target)
    assert (status, err) == (0, '')
    assert 'decode_head.predictor.class_embed.weight' in load_file(target)


def test_command_line_refuses_what_does_not_fit(tmp_path: Path, classifier: dict, run_tool) -> None:
    source, target = tmp_path / 'odd.pth', tmp_path / 'ours.safetensors'
    torch.save({'model': {**classifier, 'something.else': torch.ones(3)}}, source)
    status, out, err = run_tool(source, target)
    assert status == 1
    assert 'unexpected: something.else' in out
    assert 'was not written' in err
    status, _, err = run_tool('--arch', 'tiny', source, target)
    assert status == 1
    assert 'weights are of AFF no published variant (embed_dims=[12, 16, 24, 24]' in err
    assert 'not of tiny: AFF tiny or tiny_1_5th (embed_dims=[64, 128, 256, 512]' in err
    status, _, err = run_tool('--ema', source, target)
    assert (status, 'no averaged weights' in err) == (1, True)
    assert not target.exists()
    assert run_tool(source, target, '--force')[0] == 1
    assert target.exists()
    assert 'there is no such file' in run_tool(tmp_path / 'nothing.pth')[2]
