"""The shared part of tools/train.py and tools/test.py."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from boltz_mm.registry import OPTIM_WRAPPERS
from boltz_mm.utils import launch

ROOT = Path(__file__).resolve().parents[2]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_config_arguments(parser)
    launch.add_run_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / 'small.py'
    path.write_text("model = dict(type='X', width=[1, 2])\noptim_wrapper = dict(type='OptimWrapper')\n")
    return str(path)


@pytest.mark.parametrize('spelling', ['--local_rank', '--local-rank'])
def test_both_spellings_of_local_rank(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    args = parse('x.py', f'{spelling}=3')
    assert args.local_rank == 3


def test_overrides_and_work_dir(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = launch.read_config(parse(config, '--cfg-options', 'model.width=[3,4]', 'seed.x=1', '--launcher', 'mpi'))
    assert (cfg.model.width, cfg.seed.x, cfg.launcher) == ([3, 4], 1, 'mpi')
    assert Path(cfg.work_dir) == Path('work_dirs/small')
    assert launch.read_config(parse(config, '--work-dir', 'here')).work_dir == 'here'
    assert launch.read_config(parse(config, '--cfg-options', 'work_dir=there')).work_dir == 'there'


def test_dumped_config_keeps_its_name_outside_the_checkout(config: str, tmp_path: Path) -> None:
    cfg = launch.read_config(parse(config, '--work-dir', str(tmp_path / 'work')))
    assert Path(cfg.filename).name == 'small.py'


def test_dumped_config_is_not_found_by_mim_inside_the_checkout(config: str) -> None:
    cfg = launch.read_config(parse(config, '--work-dir', str(ROOT / 'work_dirs' / 'small')))
    assert Path(cfg.filename).name == 'config.py'
    assert cfg.experiment_name == 'small'


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('OptimWrapper', 'AmpOptimWrapper'),
        ('AmpOptimWrapper', 'AmpOptimWrapper'),
        ('boltz_mm.FiniteOptimWrapper', 'boltz_mm.FiniteAmpOptimWrapper'),
        ('boltz_mm.FiniteAmpOptimWrapper', 'boltz_mm.FiniteAmpOptimWrapper'),
    ],
)
def test_amp_takes_the_mixed_form_of_a_wrapper(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, 'get_device', lambda: 'cuda')
    cfg = Config(dict(optim_wrapper=dict(type=before)))
    launch.enable_amp(cfg)
    assert cfg.optim_wrapper == dict(type=after, loss_scale='dynamic')
    assert OPTIM_WRAPPERS.get(after) is not None


@pytest.mark.parametrize(
    ('kind', 'sentence'),
    [('OptimWrapper', 'needs an accelerator'), ('Strange', 'no mixed-precision form'), (int, 'string')],
)
def test_amp_refusals(kind: object, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    with pytest.raises(SystemExit, match=sentence):
        launch.enable_amp(Config(dict(optim_wrapper=dict(type=kind))))


def test_amp_of_our_wrapper_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    cfg = Config(dict(optim_wrapper=dict(type='boltz_mm.FiniteOptimWrapper')))
    launch.enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'boltz_mm.FiniteAmpOptimWrapper'


def test_auto_scale_lr() -> None:
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    launch.enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    with pytest.raises(SystemExit, match='base_batch_size'):
        launch.enable_auto_scale_lr(Config(dict(auto_scale_lr=dict(enable=False))))


def test_resume(tmp_path: Path) -> None:
    checkpoint = tmp_path / 'a.pth'
    checkpoint.touch()
    for resume, load_from in (('auto', None), (str(checkpoint), str(checkpoint)), ('s3://bucket/a.pth',) * 2):
        cfg = Config(dict(load_from='other.pth', resume=False))
        launch.set_resume(cfg, resume)
        assert (cfg.resume, cfg.load_from) == (True, load_from)
    cfg = Config(dict(load_from='other.pth', resume=False))
    launch.set_resume(cfg, None)
    assert (cfg.resume, cfg.load_from) == (False, 'other.pth')
    with pytest.raises(SystemExit, match='nowhere.pth does not exist'):
        launch.set_resume(cfg, 'nowhere.pth')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (['train.py', 'nowhere.py'], 'the config nowhere.py does not exist'),
        (['train.py', 'configs/boxer/boxer_tiny_shapes.py', '--resume', 'no.pth'], 'the checkpoint no.pth does not'),
        (['test.py', 'configs/boxer/boxer_tiny_shapes.py', 'no.pth'], 'the checkpoint no.pth does not exist'),
        (['test.py', 'nowhere.py', 'x.pth', '--out', 'x.json'], '--out must name a .pkl'),
    ],
)
def test_one_sentence_for_a_wrong_argument(words: list[str], sentence: str) -> None:
    command = [sys.executable, f'tools/{words[0]}', *words[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert 'Traceback' not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith('error: ')
    assert sentence in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'test.py'])
def test_help_has_what_mim_must_not_misread(script: str) -> None:
    text = subprocess.run(
        [sys.executable, f'tools/{script}', '-h'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert '--gpus' not in text
    known = {'train.py': ['--amp', '--auto-scale-lr', '--resume'], 'test.py': ['--out', '--show-dir', '--tta']}
    for argument in [*known[script], '--work-dir', '--cfg-options', '--launcher']:
        assert argument in text
