"""Curves and times from the logs that mmengine writes (``WORK_DIR/TIMESTAMP/vis_data/scalars.json``).

A log has one JSON object a line: training lines carry ``iter``, evaluation lines do not, and name their metrics as in
``coco/bbox_mAP``.  An evaluation stands at its epoch, in a run by iteration at the last iteration logged before it
(there mmengine writes step 0 unless ``LoggerHook`` has ``log_metric_by_epoch=False``).
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values of one key over a run.

    Attributes:
        steps: Where on the horizontal axis, [N].
        values: What was logged, [N].
        axis: ``'iter'`` for training, ``'epoch'`` or ``'iter'`` for evaluations.
        evaluation: Whether the values come from evaluations.
    """

    steps: np.ndarray
    values: np.ndarray
    axis: str
    evaluation: bool


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """The lines of a log.

    Attributes:
        name: What to call it in legends and messages.
        train: Training lines.
        evaluations: Evaluation lines.
        by_epoch: Whether evaluations are counted in epochs.
    """

    name: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    by_epoch: bool

    @property
    def keys(self) -> list[str]:
        """Every number that can be plotted, evaluation metrics without what stands before their last slash."""
        lines = [*self.train, *self.evaluations]
        return sorted({_short(key) for line in lines for key, value in line.items() if isinstance(value, int | float)})

    def curve(self, key: str, start_epoch: int = 1) -> Curve:
        """Values of a key.

        Args:
            key: A key of training lines, or an evaluation metric with or without its prefix.
            start_epoch: Leave out what comes before this epoch.

        Returns:
            The curve.

        Raises:
            KeyError: If no line has the key; names those that there are.
        """
        axis = 'epoch' if self.by_epoch else 'iter'
        found = [
            (line.get('step', 0), line[name])
            for line in self.evaluations
            for name in line
            if key in (name, _short(name)) and name not in ('step', 'time', 'data_time')
            if not self.by_epoch or line.get('step', 0) >= start_epoch
        ]
        if found:
            steps, values = zip(*found, strict=True)
            return Curve(np.array(steps), np.array(values, float), axis, True)
        lines = [line for line in self.train if key in line and line.get('epoch', start_epoch) >= start_epoch]
        if not lines:
            raise KeyError(f'{self.name} has no {key!r}; it has {", ".join(self.keys)}')
        return Curve(
            np.array([line['iter'] for line in lines]), np.array([line[key] for line in lines], float), 'iter', False
        )

    def epoch_times(self, include_outliers: bool = False) -> dict[int, float]:
        """Mean seconds per iteration of each epoch.

        Args:
            include_outliers: Keep the first line of every epoch, which includes the start of the data loader.

        Returns:
            Seconds by epoch; a run without epochs counts as one.

        Raises:
            KeyError: If an epoch has too few lines to tell.
        """
        times: dict[int, list[float]] = {}
        for line in self.train:
            if 'time' in line:
                times.setdefault(int(line.get('epoch', 1)), []).append(float(line['time']))
        kept = {epoch: values if include_outliers else values[1:] for epoch, values in times.items()}
        kept = {epoch: values for epoch, values in kept.items() if values}
        if not kept:
            raise KeyError(
                f'{self.name} has too few training lines to tell the time of an iteration: log more often, or include '
                'the first line of every epoch'
            )
        return {epoch: float(np.mean(values)) for epoch, values in kept.items()}


def _short(key: str) -> str:
    return key.rsplit('/', 1)[-1]


def read_log(path: str | os.PathLike[str]) -> TrainingLog:
    """Read a log.

    Args:
        path: A ``scalars.json``, or a folder that contains some at any depth (the latest is read).

    Returns:
        The log.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not JSON, with its number, or the file has no lines.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(file.rglob('vis_data/scalars.json'), key=lambda f: f.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f'{path} contains no vis_data/scalars.json')
        file = found[-1]
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f'{file}, line {number} is not JSON: {error.msg}') from None
        if isinstance(line, dict) and len(line) > 1:
            lines.append(line)
    if not lines:
        raise ValueError(f'{file} is empty')
    train = [line for line in lines if 'iter' in line]
    by_epoch = any('epoch' in line for line in train)
    evaluations, last = [], 0
    for line in lines:
        if 'iter' in line:
            last = int(line.get('epoch' if by_epoch else 'iter', last))
        else:
            evaluations.append({**line, 'step': max(last, int(line.get('step', 0)))})
    return TrainingLog(str(path), train, evaluations, by_epoch)


def plot_curves(
    logs: Sequence[TrainingLog],
    keys: Sequence[str],
    *,
    legend: Sequence[str] | None = None,
    title: str | None = None,
    start_epoch: int = 1,
    figure: Figure | None = None,
) -> Figure:
    """Draw curves: training values on one pair of axes, evaluation metrics on another.

    Args:
        logs: What to draw.
        keys: Which numbers of each log.
        legend: A name for each curve, logs outside, keys inside; by default the keys, with the log's name if there
            are several logs.
        title: Title of the figure.
        start_epoch: Leave out what comes before this epoch.
        figure: Where to draw, such as one that belongs to a window; a new one by default.

    Returns:
        The figure, to be saved with its ``savefig``.

    Raises:
        KeyError: If a log lacks a key.
        ValueError: If the legend has the wrong number of names.
    """
    names = [f'{log.name} {key}' if len(logs) > 1 else key for log in logs for key in keys]
    if legend is not None and len(legend) != len(names):
        raise ValueError(f'the legend needs {len(names)} names (logs x keys), got {len(legend)}')
    curves = [log.curve(key, start_epoch) for log in logs for key in keys]
    named = list(zip(legend or names, curves, strict=True))
    groups = [
        [(name, curve) for name, curve in named if curve.evaluation is evaluation] for evaluation in (False, True)
    ]
    groups = [group for group in groups if group]
    figure = figure or Figure(layout='constrained')
    figure.set_size_inches(7.0 * len(groups), 4.2)
    for column, group in enumerate(groups):
        axes = figure.add_subplot(1, len(groups), column + 1)
        for name, curve in group:
            marker = {'marker': 'o', 'markersize': 4} if curve.evaluation else {'linewidth': 1.2}
            axes.plot(curve.steps, curve.values, label=name, **marker)
        axes.set_xlabel('iteration' if group[0][1].axis == 'iter' else 'epoch')
        axes.set_title('evaluation' if group[0][1].evaluation else 'training', fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if group[0][1].evaluation:
            top = max(float(curve.values.max()) for _, curve in group)
            axes.set_ylim(0, 1 if 0.5 < top <= 1 else None)
        axes.legend(frameon=False, fontsize=9)
    if title is not None:
        figure.suptitle(title)
    return figure


def loss_keys(log: TrainingLog, limit: int = 6) -> list[str]:
    """The keys of a training overview: ``loss`` and the parts of the last layer (no ``d0.`` or ``enc_`` prefix)."""
    parts = [key for key in log.keys if key.startswith('loss_') and '.' not in key]
    return [key for key in ['loss', *parts][:limit] if any(key in line for line in log.train)]


def metric_keys(log: TrainingLog) -> list[str]:
    """The AP keys that a log has, in the usual order."""
    wanted = [f'{kind}_mAP{suffix}' for kind in ('bbox', 'segm') for suffix in ('', '_50', '_75')]
    return [key for key in wanted if key in log.keys]
