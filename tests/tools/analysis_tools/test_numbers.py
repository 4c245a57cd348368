"""The tools that print numbers."""

import json
from pathlib import Path

import pytest

from boltz_mm.apis.build import build_model
from boltz_mm.utils.launch import load_config
from tools.analysis_tools import analyze_logs, benchmark, get_flops

from ..conftest import Tiny


@pytest.fixture
def scalars(tmp_path: Path) -> str:
    lines = [{'loss': 5.0 - k, 'time': 0.2, 'iter': k, 'epoch': 1, 'step': k} for k in range(1, 4)]
    lines.append({'coco/bbox_mAP': 0.3, 'time': 1.0, 'step': 1})
    path = tmp_path / 'scalars.json'
    path.write_text('\n'.join(json.dumps(line) for line in lines))
    return str(path)


def test_plot_curve(scalars: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / 'new' / 'curve.png'
    assert analyze_logs.main(['plot_curve', scalars, '--out', str(out), '--title', 'run']) == 0
    assert out.read_bytes().startswith(b'\x89PNG')
    assert str(out) in capsys.readouterr().out
    assert analyze_logs.main(['plot_curve', scalars, '--keys', 'acc', '--out', str(out)]) == 1
    assert "has no 'acc'" in capsys.readouterr().err


def test_cal_train_time(scalars: str, capsys: pytest.CaptureFixture) -> None:
    assert analyze_logs.main(['cal_train_time', scalars]) == 0
    assert 'average iter time: 0.2000 s/iter' in capsys.readouterr().out
    assert analyze_logs.main(['cal_train_time', f'{scalars}x']) == 1
    assert 'scalars.jsonx' in capsys.readouterr().err


def test_get_flops_of_a_shape(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    get_flops.main([tiny.config, '--shape', '64', '96'])
    out = capsys.readouterr().out
    assert 'Input shape: (64, 96)' in out
    assert 'aten.convolution' in out
    assert 'box_attention' in out or 'grid_sampler_2d' in out
    params = float(out.split('Params: ')[1].split('M')[0])
    model, _ = build_model(load_config(tiny.config), device='cpu')
    assert params == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=1e-3)


def test_get_flops_of_images(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    get_flops.main([tiny.config, '--num-images', '2', '--mode', 'tensor'])
    out = capsys.readouterr().out
    assert 'Input shape: (128, 128)' in out
    assert 'load a picture from the dataset' in out


def test_get_flops_refuses_a_wrong_shape(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        get_flops.main([tiny.config, '--shape', '0'])
    assert 'one or two positive numbers' in capsys.readouterr().err


@pytest.mark.parametrize('task', ['inference', 'dataloader', 'dataset'])
def test_benchmark_ends_with_the_data(tiny: Tiny, tmp_path: Path, task: str) -> None:
    arguments = [tiny.config, '--task', task, '--num-warmup', '1', '--work-dir', str(tmp_path / 'logs')]
    if task == 'inference':
        arguments += ['--checkpoint', tiny.checkpoint, '--repeat-num', '2', '--device', 'cpu', '--fuse-conv-bn']
    benchmark.main(arguments)
    log = (tmp_path / 'logs/benchmark.log').read_text()
    assert 'Overall fps' in log


def test_benchmark_needs_more_than_the_warm_up(tiny: Tiny) -> None:
    with pytest.raises(SystemExit, match='4 images or batches leave nothing'):
        benchmark.main([tiny.config, '--task', 'dataset', '--num-warmup', '4'])
