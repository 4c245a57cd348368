"""A tiny model and data set that draw random numbers everywhere, and runs of them through mmengine's runner."""

import random

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

import boltz_mm.engine  # noqa: F401

SAMPLES = 12


@DATASETS.register_module(force=True)
class NoisyPoints(BaseDataset):
    """Points with noise from all three generators that transforms use."""

    METAINFO = dict(classes=('near', 'far'), palette=[(1, 2, 3), (4, 5, 6)])

    def load_data_list(self) -> list[dict]:
        return [dict(number=number) for number in range(SAMPLES)]

    def prepare_data(self, idx: int) -> dict:
        number = self.get_data_info(idx)['number']
        noise = random.random() + np.random.rand() + torch.rand(4) * np.random.randint(1, 3)
        sample = BaseDataElement(metainfo=dict(img_id=number, img_path=f'{number}.png'))
        return dict(inputs=torch.full((4,), float(number)) / SAMPLES + noise, data_samples=sample)


@MODELS.register_module(force=True)
class DroppingNet(BaseModel):
    """Two layers with dropout and normalisation, one loss; `explode_at` makes a step go wrong."""

    def __init__(self, explode_at: int = -1, width: int = 8, classes: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        self.explode_at = explode_at
        self.calls = 0

    def forward(self, inputs: list, data_samples: list | None = None, mode: str = 'loss'):
        features = self.head(self.drop(torch.relu(self.norm(self.first(torch.stack(inputs))))))
        if mode != 'loss':
            return data_samples
        self.calls += 1
        loss = (features - torch.rand_like(features) - random.random() - np.random.rand()).square().mean()
        return dict(loss_square=loss * (float('nan') if self.calls == self.explode_at else 1.0))


@METRICS.register_module(force=True)
class DrawingMetric(BaseMetric):
    """A metric that draws, as samplers of validation points do; grows so that a best checkpoint is kept."""

    count = 0

    def process(self, data_batch, data_samples) -> None:
        self.results.append(torch.rand(1).item() + random.random() + np.random.rand())

    def compute_metrics(self, results: list) -> dict:
        type(self).count += 1
        return dict(score=float(self.count))


def config(
    work_dir, *, by_epoch=True, total=4, workers=0, ema=False, amp=False, accumulate=1, persistent=False, **more
):
    """A config of a run over 12 samples in batches of 3: `total` epochs of 4 iterations, or `total` iterations."""
    wrapper = 'boltz_mm.FiniteAmpOptimWrapper' if amp else 'boltz_mm.FiniteOptimWrapper'
    sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
    loader = dict(batch_size=3, num_workers=workers, dataset=dict(type='NoisyPoints', serialize_data=False))
    hooks = [dict(type='boltz_mm.RNGStateHook'), dict(type='boltz_mm.ScheduleRefreshHook')]
    hooks += [dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1)] if ema else []
    cfg = dict(
        model=dict(type='DroppingNet'),
        work_dir=str(work_dir),
        train_dataloader=dict(loader, sampler=sampler, persistent_workers=persistent and workers > 0),
        val_dataloader=dict(dict(loader, num_workers=0), sampler=dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=dict(type='DrawingMetric'),
        val_cfg=dict(),
        train_cfg=dict(by_epoch=True, max_epochs=total) if by_epoch else dict(by_epoch=False, max_iters=total),
        optim_wrapper=dict(
            type=wrapper,
            optimizer=dict(type='AdamW', lr=0.05),
            clip_grad=dict(max_norm=1.0),
            accumulative_counts=accumulate,
        ),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3)],
        default_hooks=dict(
            checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=1 if by_epoch else 2, by_epoch=by_epoch),
            logger=dict(type='LoggerHook', interval=100),
        ),
        custom_hooks=hooks,
        default_scope='mmengine',
        randomness=dict(seed=5),
        experiment_name=f'toy{abs(hash(str(work_dir)))}',
        log_level='WARNING',
    )
    if amp:
        cfg['optim_wrapper'].update(dtype='bfloat16', loss_scale='dynamic')
    if not by_epoch:
        cfg['train_cfg']['val_interval'] = 2
    for key, value in more.items():
        cfg[key] = {**cfg[key], **value} if isinstance(cfg.get(key), dict) and isinstance(value, dict) else value
    return Config(cfg)


def run(work_dir, *, resume=False, disturb=True, name='', **kwargs) -> Runner:
    """Train; `disturb` moves all random states first, as another program start would."""
    if disturb:
        seed = 1000 + abs(hash((str(work_dir), resume, name))) % 1000
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    cfg = config(work_dir, **kwargs)
    cfg.resume = bool(resume)
    cfg.load_from = str(resume) if isinstance(resume, str) else None
    cfg.experiment_name += f'_{name}_{random.random()}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    # Left to the garbage collector, live workers cost five seconds each: it finalises their queues first.
    runner.train_dataloader._iterator = None
    if hasattr(runner.train_loop, 'dataloader_iterator'):
        runner.train_loop.dataloader_iterator = None
    return runner


def difference(first: Runner, second: Runner) -> float:
    """Largest difference of any weight, buffer, EMA weight or optimizer state."""
    worst = 0.0
    states = [runner.model.state_dict() for runner in (first, second)]
    for hooks in zip(first.hooks, second.hooks, strict=True):
        if hasattr(hooks[0], 'ema_model'):
            states = [
                {**state, **{f'ema.{key}': value for key, value in hook.ema_model.state_dict().items()}}
                for state, hook in zip(states, hooks, strict=True)
            ]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        worst = max(worst, float((value.double() - states[1][key].double()).abs().max()))
    return worst
