"""What the benchmarks share: timing two sides in turn, memory in use, and how a result is printed."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


class Clock:
    """Seconds of the wall clock, or of the processor: the time of one thread on a machine that others use too."""

    def __init__(self) -> None:
        self.read = time.perf_counter

    def use_processor(self) -> None:
        """Count the processor time of this process from now on."""
        self.read = time.process_time


CLOCK = Clock()


@dataclass(frozen=True)
class Record:
    """One line of a benchmark.

    Attributes:
        name: What was timed (operator or model).
        case: Its sizes.
        device: ``'cpu'`` or ``'cuda'``.
        dtype: dtype of the inputs.
        direction: ``'fwd'``, ``'fwdbwd'`` or ``'predict'``.
        ms: Median time in milliseconds.
        baseline: What it is compared with.
        baseline_ms: Median time of the baseline.
        extra_bytes: Peak of memory allocated by the call, its results included.
        threads: Threads that PyTorch used.
        baseline_extra_bytes: Peak of memory allocated by the baseline, where it was measured.
    """

    name: str
    case: str
    device: str
    dtype: str
    direction: str
    ms: float
    baseline: str
    baseline_ms: float
    extra_bytes: int
    threads: int = field(default_factory=torch.get_num_threads)
    baseline_extra_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_ms / self.ms

    def as_json(self, subject: str) -> str:
        """The record as one JSON object; ``subject`` names the first key."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        ordered = {subject: values.pop('name'), **values, 'ratio': self.ratio}
        rounded = {k: float(f'{v:.5g}') if isinstance(v, float) else v for k, v in ordered.items()}
        return json.dumps(rounded)


def _synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def time_once(work: Work, device: str) -> float:
    """Milliseconds of one call, finished on its device."""
    _synchronize(device)
    start = CLOCK.read()
    work()
    _synchronize(device)
    return (CLOCK.read() - start) * 1000


def compare(ours: Work, baseline: Work, device: str, repeats: int, warmup: int = 1) -> tuple[float, float]:
    """Time two sides in turn, so that a noisy neighbour disturbs both.

    Returns:
        Median milliseconds of ours and of the baseline.
    """
    ms, baseline_ms = medians([ours, baseline], device, repeats, warmup)
    return ms, baseline_ms


def medians(works: Sequence[Work], device: str, repeats: int, warmup: int = 1) -> list[float]:
    """Time several sides in turn.

    Returns:
        Median milliseconds of each.
    """
    for _ in range(warmup):
        for work in works:
            work()
    rounds = [[time_once(work, device) for work in works] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def extra_bytes(work: Work, device: str) -> int:
    """Peak memory that one call allocates through PyTorch, above what was allocated before."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    in_use = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def _extra(record: Record) -> str:
    text = f'{record.extra_bytes / 2**20:.1f} MiB extra'
    if record.baseline_extra_bytes is None:
        return text
    share = record.extra_bytes / max(1, record.baseline_extra_bytes)
    return f'{text}, {share:.2f} of the baseline'


def report(records: Iterable[Record], *, as_json: bool, title: str, subject: str) -> None:
    """Print records as they come: JSON lines, or a table under a title."""
    if not as_json:
        print(title)
        print(f'{subject:18}{"case":30}{"dtype":10}{"direction":10}{"ms":>10}{"baseline ms":>13}{"ratio":>7}  baseline')
    for record in records:
        if as_json:
            print(record.as_json(subject), flush=True)
        else:
            print(
                f'{record.name:18}{record.case:30}{record.dtype:10}{record.direction:10}{record.ms:10.2f}'
                f'{record.baseline_ms:13.2f}{record.ratio:7.1f}  {record.baseline} '
                f'({_extra(record)})',
                flush=True,
            )
