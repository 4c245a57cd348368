"""Logs are read, drawn and timed."""

import json
from pathlib import Path

import pytest

from boltz_mm.visualization.logs import TrainingLog, loss_keys, metric_keys, plot_curves, read_log


def _write(path: Path, lines: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def _lines(by_epoch: bool = True) -> list[dict]:
    lines = []
    for epoch in (1, 2, 3):
        for k in range(3):
            at = (epoch - 1) * 30 + 10 * (k + 1)
            line = {'loss': 9.0 - epoch, 'loss_cls': 1.0, 'd0.loss_cls': 2.0, 'time': 1.0 if k == 0 else 0.1 * epoch}
            lines.append({**line, 'iter': at, 'step': at, **({'epoch': epoch} if by_epoch else {})})
        step = epoch if by_epoch else 30 * epoch
        lines.append({'coco/bbox_mAP': 0.1 * epoch, 'coco/bbox_mAP_50': 0.2 * epoch, 'time': 5.0, 'step': step})
    return lines


@pytest.fixture
def log(tmp_path: Path) -> TrainingLog:
    return read_log(_write(tmp_path / 'scalars.json', _lines()))


def test_training_and_evaluation_curves(log: TrainingLog) -> None:
    loss = log.curve('loss')
    assert loss.steps.tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert loss.values.tolist() == [8.0] * 3 + [7.0] * 3 + [6.0] * 3
    assert (loss.axis, loss.evaluation) == ('iter', False)
    for key in ('bbox_mAP', 'coco/bbox_mAP'):
        metric = log.curve(key)
        assert metric.steps.tolist() == [1, 2, 3]
        assert metric.values.tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert (metric.axis, metric.evaluation) == ('epoch', True)


def test_start_epoch(log: TrainingLog) -> None:
    assert log.curve('loss', start_epoch=3).steps.tolist() == [70, 80, 90]
    assert log.curve('bbox_mAP', start_epoch=2).steps.tolist() == [2, 3]


def test_time_is_that_of_training(log: TrainingLog) -> None:
    assert not log.curve('time').evaluation
    assert log.epoch_times() == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert log.epoch_times(include_outliers=True) == pytest.approx({1: 0.4, 2: 1.4 / 3, 3: 1.6 / 3})


@pytest.mark.parametrize('logged', [True, False])
def test_run_by_iteration(tmp_path: Path, logged: bool) -> None:
    lines = _lines(by_epoch=False)
    if not logged:  # what mmengine writes by default
        lines = [line if 'iter' in line else {**line, 'step': 0} for line in lines]
    log = read_log(_write(tmp_path / 'scalars.json', lines))
    assert log.curve('bbox_mAP').axis == 'iter'
    assert log.curve('bbox_mAP', start_epoch=2).steps.tolist() == [30, 60, 90]
    assert list(log.epoch_times()) == [1]


def test_overview_keys(log: TrainingLog) -> None:
    assert loss_keys(log) == ['loss', 'loss_cls']
    assert metric_keys(log) == ['bbox_mAP', 'bbox_mAP_50']


def test_unknown_key_names_those_there_are(log: TrainingLog) -> None:
    with pytest.raises(KeyError, match="'loss_mask'; it has bbox_mAP"):
        log.curve('loss_mask')


def test_too_few_lines_for_times(tmp_path: Path) -> None:
    log = read_log(_write(tmp_path / 'scalars.json', _lines()[:1]))
    with pytest.raises(KeyError, match='log more often'):
        log.epoch_times()


def test_latest_log_of_a_folder(tmp_path: Path) -> None:
    import os

    for name, when in (('b', 100), ('a', 200)):
        file = _write(tmp_path / name / 'vis_data' / 'scalars.json', [{'loss': when, 'iter': 1}])
        os.utime(file, (when, when))
    assert read_log(tmp_path).curve('loss').values.tolist() == [200]


def test_bad_logs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / 'nothing.json')
    with pytest.raises(FileNotFoundError, match='no vis_data'):
        read_log(tmp_path)
    broken = tmp_path / 'broken.json'
    broken.write_text('{"loss": 1, "iter": 1}\n{"loss": ')
    with pytest.raises(ValueError, match='broken.json, line 2'):
        read_log(broken)
    broken.write_text('\n')
    with pytest.raises(ValueError, match='empty'):
        read_log(broken)


def test_plot_separates_training_from_evaluation(log: TrainingLog, tmp_path: Path) -> None:
    figure = plot_curves([log], ['loss', 'loss_cls', 'bbox_mAP'], title='run')
    training, evaluation = figure.axes
    assert [line.get_label() for line in training.lines] == ['loss', 'loss_cls']
    assert [line.get_label() for line in evaluation.lines] == ['bbox_mAP']
    assert (training.get_xlabel(), evaluation.get_xlabel()) == ('iteration', 'epoch')
    figure.savefig(tmp_path / 'curves.png')
    assert len(plot_curves([log, log], ['loss'], legend=['a', 'b']).axes[0].lines) == 2
    with pytest.raises(ValueError, match='needs 2 names'):
        plot_curves([log, log], ['loss'], legend=['a'])
