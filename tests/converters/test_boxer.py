"""Official BoxeR-2D weights: containers, names, reports, the way back, the command line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from boltz_mm.converters.boxer import convert_boxer, export_boxer, infer_boxer_config, our_key
from boltz_mm.converters.common import official_state_dict
from boltz_mm.registry import MODELS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'data' / 'parity' / 'boxer'
CASES = ['boxer2d_det', 'boxer2d_seg_v1', 'boxer2d_seg_v2']


def load(case):
    return torch.load(GOLDEN / case / 'weights.pth', weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope='module')
def official():
    return official_state_dict(load('boxer2d_seg_v1'))


@pytest.mark.parametrize('case', CASES)
def test_everything_finds_its_place_and_the_way_back(case):
    container = load(case)
    state, report = convert_boxer(container)
    model = MODELS.build(infer_boxer_config(state, num_queries=8))
    state, report = convert_boxer(container, model)
    assert report.complete, str(report)
    model.load_state_dict(state, strict=True)
    assert_same(export_boxer(model.state_dict()), official_state_dict(container))
    assert report.num_classes == (5 if case == 'boxer2d_seg_v1' else 6)


def test_every_container_gives_the_same_weights(official):
    wanted = convert_boxer(official)[0]
    prefixed = {f'module.{key}': value for key, value in official.items()}
    training = {'model': prefixed, 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 3, 'update': 9, 'config': {'a': 1}}
    for container in (prefixed, {'model': official}, training, {'state_dict': official, 'meta': {}}):
        assert_same(convert_boxer(container)[0], wanted)
    as_arrays = {key: value.numpy() for key, value in official.items()}
    assert_same(convert_boxer({'model': as_arrays})[0], wanted)


def test_what_does_not_fit_is_reported(official):
    model = MODELS.build(infer_boxer_config(convert_boxer(official)[0]))
    wrong = dict(official)
    del wrong['detector.class_embed.bias']
    wrong['transformer.encoder.layers.0.norm1.weight'] = torch.ones(3)
    wrong['transformer.encoder.layers.7.norm1.weight'] = torch.ones(3)
    wrong['something.else'] = torch.ones(3)
    state, report = convert_boxer(wrong, model)
    assert not report.complete
    assert report.missing == ['bbox_head.cls_branch.bias']
    assert report.mismatched == {'encoder.layers.0.norm1.weight': ((3,), (64,))}
    assert sorted(report.unexpected) == ['something.else', 'transformer.encoder.layers.7.norm1.weight']
    assert 'something.else' not in state
    for words in ('missing: bbox_head.cls_branch.bias', 'unexpected: something.else', '(3,) in the file, (64,)'):
        assert words in str(report)


@pytest.mark.parametrize(
    ('container', 'words'),
    [
        ({'weight': torch.ones(1)}, 'no weights of BoxeR'),
        ({'epoch': 3}, "'epoch' is a int"),
        ({'model': [1]}, 'expected a state dict'),
        ({}, 'no weights of BoxeR'),
    ],
)
def test_something_else_is_refused(container, words):
    with pytest.raises(ValueError, match=words):
        convert_boxer(container)


def test_a_key_given_twice_is_refused(official):
    twice = {**official, 'stem.conv1.weight': official['backbone.conv1.weight']}
    with pytest.raises(ValueError, match=r"two tensors of the file become 'backbone.conv1.weight'"):
        convert_boxer(twice)


def test_unknown_keys_have_no_official_name(official):
    state, _ = convert_boxer(official)
    with pytest.raises(ValueError, match=r"'mine.weight' has no place"):
        export_boxer({**state, 'mine.weight': torch.ones(1)})


DETECTRON2 = {
    'stem.conv1.weight': 'conv1.weight',
    'stem.conv1.norm.running_mean': 'bn1.running_mean',
    'res2.0.shortcut.weight': 'layer1.0.downsample.0.weight',
    'res2.0.shortcut.norm.bias': 'layer1.0.downsample.1.bias',
    'res4.5.conv2.weight': 'layer3.5.conv2.weight',
    'res5.2.conv3.norm.running_var': 'layer4.2.bn3.running_var',
}


@pytest.mark.parametrize('prefix', ['', 'backbone.bottom_up.', 'backbone.'])
@pytest.mark.parametrize(('theirs', 'torchvision'), DETECTRON2.items())
def test_detectron2_names(prefix, theirs, torchvision):
    assert our_key(prefix + theirs, 3) == 'backbone.' + torchvision


def test_backbone_files(official):
    """A file of the backbone alone, with torchvision or Detectron2 names, gives the weights of the whole model's."""
    backbone = {k.removeprefix('backbone.'): v for k, v in official.items() if k.startswith('backbone.')}
    wanted = {k: v for k, v in convert_boxer(official)[0].items() if k.startswith('backbone.')}
    state, report = convert_boxer({**backbone, 'fc.weight': torch.ones(1)})
    assert_same(state, wanted)
    assert report.unexpected == ['fc.weight']
    assert report.num_classes is None

    def detectron2(key):
        for old, new in (('conv1', 'stem.conv1'), ('bn1', 'stem.conv1.norm')):
            if key.startswith(old + '.'):
                return new + key.removeprefix(old)
        for i in range(1, 5):
            key = key.replace(f'layer{i}.', f'res{i + 1}.')
        for i in range(1, 4):
            key = key.replace(f'.bn{i}.', f'.conv{i}.norm.')
        return key.replace('downsample.0.', 'shortcut.').replace('downsample.1.', 'shortcut.norm.')

    assert_same(convert_boxer({'model': {detectron2(k): v for k, v in backbone.items()}})[0], wanted)


def test_five_levels_keep_their_projections():
    assert our_key('input_proj.2.0.weight', 3) == 'neck.convs.2.conv.weight'
    assert our_key('input_proj.4.1.bias', 3) == 'neck.extra_convs.1.gn.bias'


@pytest.mark.parametrize('depth', [18, 34, 101])
def test_config_of_other_depths(official, depth):
    config = infer_boxer_config(convert_boxer(official)[0])
    config['backbone']['depth'] = depth
    if depth < 50:
        config['neck']['in_channels'] = [c // 4 for c in config['neck']['in_channels']]
    assert infer_boxer_config(MODELS.build(config).state_dict()) == config


def test_config_of_a_backbone_file_is_refused(official):
    backbone = {k: v for k, v in official.items() if k.startswith('backbone.')}
    with pytest.raises(ValueError, match=r"not of a whole model: 'bbox_head.cls_branch.weight' is missing"):
        infer_boxer_config(convert_boxer(backbone)[0])


def test_config_without_a_neck_is_refused(official):
    state = {k: v for k, v in convert_boxer(official)[0].items() if not k.startswith('neck.')}
    with pytest.raises(ValueError, match="'neck.convs' is missing"):
        infer_boxer_config(state)


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run the tool in this process: exit status and what it printed."""

    def run(*arguments):
        tool = ROOT / 'tools' / 'model_converters' / 'boxer2mm.py'
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_status:
            runpy.run_path(str(tool), run_name='__main__')
        printed = capsys.readouterr()
        return exit_status.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_command_line_there_and_back(tmp_path, official, suffix, run_tool):
    ours, back = tmp_path / f'ours.{suffix}', tmp_path / 'back.pth'
    status, out, _ = run_tool(GOLDEN / 'boxer2d_seg_v1' / 'weights.pth', ours)
    assert status == 0
    assert '5 classes' in out
    state = load_file(ours) if suffix == 'safetensors' else torch.load(ours, weights_only=True)['state_dict']
    assert_same(state, convert_boxer(official)[0])
    assert run_tool('--reverse', ours, back)[0] == 0
    assert_same(torch.load(back, weights_only=True), official)


def test_command_line_writes_safetensors_by_default(tmp_path, monkeypatch, run_tool):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_tool(GOLDEN / 'boxer2d_det' / 'weights.pth')
    assert status == 0
    assert 'written to weights.safetensors' in out
    assert 'bbox_head.cls_branch.weight' in load_file(tmp_path / 'weights.safetensors')


def test_command_line_writes_nothing_if_keys_do_not_fit(tmp_path, official, run_tool):
    source, target = tmp_path / 'odd.pth', tmp_path / 'ours.safetensors'
    torch.save({**official, 'something.else': torch.ones(3)}, source)
    status, out, err = run_tool(source, target)
    assert status == 1
    assert 'unexpected: something.else' in out
    assert 'was not written' in err
    assert not target.exists()
    assert run_tool(source, target, '--force')[0] == 1
    assert target.exists()


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (b'', 'the file is empty'),
        ({'fc.weight': torch.ones(3)}, 'no weights of BoxeR'),
        (None, 'there is no such file'),
    ],
    ids=['empty', 'another model', 'missing'],
)
def test_command_line_says_what_is_wrong_in_one_sentence(tmp_path, run_tool, content, sentence):
    source, target = tmp_path / 'source.pth', tmp_path / 'ours.safetensors'
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    status, _, err = run_tool(source, target)
    assert status == 1
    assert err.count('\n') == 1
    assert err.startswith(f'{source}: ')
    assert sentence in err
    assert not target.exists()


def test_command_line_names_a_target_that_cannot_be_written(tmp_path, run_tool):
    (tmp_path / 'file').touch()
    status, _, err = run_tool(GOLDEN / 'boxer2d_det' / 'weights.pth', tmp_path / 'file' / 'ours.safetensors')
    assert status == 1
    assert err.startswith(f'could not write {tmp_path / "file" / "ours.safetensors"}: ')
