"""Speed of inference, of the data loader and of the dataset, on any device.

mmdet's classes with three things mended: its inference benchmark needs CUDA and a checkpoint, and all three divide by
zero when there are fewer images than ``max_iter``.
"""

import copy
import time
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.utils.benchmark import BaseBenchmark, DataLoaderBenchmark, DatasetBenchmark, print_log
from mmengine import MMLogger
from mmengine.config import Config
from mmengine.runner import Runner

from boltz_mm.apis.build import build_model


class InferenceBenchmark(BaseBenchmark):  # type: ignore[misc]
    """Images per second of ``model.test_step`` on single images of the test set.

    Args:
        cfg: Config with model and test_dataloader.
        checkpoint: Weights; None measures with the initial ones.
        fuse: Fold batch norms into convolutions first.
        max_iter: Most images.
        log_interval: Images between two log lines.
        num_warmup: Images that do not count.
        logger: Where to log; standard output if None.
        device: Where the model runs; None takes an accelerator if there is one.

    Raises:
        ValueError: If no image is left to be measured after the warm-up.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None = None,
        fuse: bool = False,
        max_iter: int = 2000,
        log_interval: int = 50,
        num_warmup: int = 5,
        logger: MMLogger | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(max_iter, log_interval, num_warmup, logger)
        self.model, _ = build_model(cfg, checkpoint, device)
        if fuse:
            self.model = fuse_conv_bn(self.model)
        self.device = next(self.model.parameters()).device
        # Workers would take processor time from the model, and a batch would hide the time of an image.
        loader: Any = copy.deepcopy(cfg.test_dataloader)
        loader.update(num_workers=0, batch_size=1, persistent_workers=False)
        self.data_loader = Runner.build_dataloader(loader)
        clamp_iterations(self, len(self.data_loader))

    def run_once(self) -> dict[str, float]:
        """Measure once.

        Returns:
            ``fps``: images per second.
        """
        total = 0.0
        for i, data in enumerate(self.data_loader):
            if i == self.max_iter:
                break
            started = self._now()
            with torch.no_grad():
                self.model.test_step(data)
            elapsed = self._now() - started
            if i >= self.num_warmup:
                total += elapsed
                if (i + 1) % self.log_interval == 0:
                    fps = (i + 1 - self.num_warmup) / total
                    print_log(
                        f'Done image [{i + 1:<3}/{self.max_iter}], fps: {fps:.1f} img/s, '
                        f'times per image: {1000 / fps:.1f} ms/img',
                        self.logger,
                    )
        return {'fps': (self.max_iter - self.num_warmup) / total}

    def average_multiple_runs(self, results: list[dict[str, float]]) -> dict[str, Any]:
        """Average runs.

        Args:
            results: What :meth:`run_once` gave.

        Returns:
            ``avg_fps`` and ``fps_list``.
        """
        rates = [round(result['fps'], 1) for result in results]
        average = sum(result['fps'] for result in results) / len(results)
        print_log(
            f'Overall fps: {rates}[{average:.1f}] img/s, times per image: {1000 / average:.1f} ms/img on {self.device}',
            self.logger,
        )
        if self.device.type == 'cuda':
            print_log(f'cuda memory: {torch.cuda.max_memory_allocated(self.device) >> 20} MB', self.logger)
        return {'avg_fps': average, 'fps_list': rates}

    def _now(self) -> float:
        if self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize(self.device)
        return time.perf_counter()


def clamp_iterations(benchmark: BaseBenchmark, available: int) -> None:
    """Make a benchmark of mmdet end with the data, and log at least once.

    Args:
        benchmark: The benchmark; its ``max_iter`` and ``log_interval`` are lowered where they are too large.
        available: How many images or batches there are.

    Raises:
        ValueError: If none is left after the warm-up.
    """
    benchmark.max_iter = min(benchmark.max_iter, available)
    benchmark.log_interval = min(benchmark.log_interval, benchmark.max_iter)
    if benchmark.num_warmup >= benchmark.max_iter:
        raise ValueError(
            f'{benchmark.max_iter} images or batches leave nothing to measure after {benchmark.num_warmup} of warm-up'
        )


def build_benchmark(cfg: Config, task: str, *, dataset_type: str = 'test', **kwargs: Any) -> BaseBenchmark:
    """Build one of the three benchmarks.

    Args:
        cfg: Config; its default scope must be initialised.
        task: ``'inference'``, ``'dataloader'`` or ``'dataset'``.
        dataset_type: Which data the last two read.
        **kwargs: Arguments of :class:`InferenceBenchmark`; the other two ignore checkpoint, fuse and device.

    Returns:
        The benchmark; ``run(repeat_num)`` measures.

    Raises:
        ValueError: If the task is unknown, or nothing is left to measure after the warm-up.
    """
    if task == 'inference':
        return InferenceBenchmark(cfg, **kwargs)
    shared = {key: kwargs[key] for key in ('max_iter', 'log_interval', 'num_warmup', 'logger') if key in kwargs}
    if task == 'dataloader':
        loading: BaseBenchmark = DataLoaderBenchmark(cfg, False, dataset_type, **shared)
        clamp_iterations(loading, len(loading.data_loader))
        return loading
    if task == 'dataset':
        reading: BaseBenchmark = DatasetBenchmark(cfg, dataset_type, **shared)
        clamp_iterations(reading, len(reading.dataset))
        return reading
    raise ValueError(f"task must be 'inference', 'dataloader' or 'dataset', got {task!r}")
