"""Random transforms whose draws depend on the seed and the place of a sample in the run, on nothing else.

mmengine seeds each worker when it starts, so augmentations depend on the number of workers and begin anew after a
resume.  Here the batch sampler attaches to every index a seed made of (run seed, rank, number of the batch since the
start of training, place in the batch), and the dataset seeds python, numpy and torch with it before it builds the
sample.  Data are then the same for 0 and 8 workers, persistent or not, and the same after a resume at any batch.
"""

import contextlib
import copy
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, get_worker_info


class SeededIndex(int):
    """An index into a dataset, with the seed of the sample that is built from it."""

    seed: tuple[int, int, int, int]

    def __new__(cls, index: int, seed: tuple[int, int, int, int]) -> 'SeededIndex':
        """Attach ``seed`` = (run seed, rank, batch, place) to ``index``."""
        value = super().__new__(cls, index)
        value.seed = seed
        return value

    def __reduce__(self) -> tuple:
        return SeededIndex, (int(self), self.seed)


@contextlib.contextmanager
def isolated_rng(seed: tuple[int, ...] | None = None) -> Iterator[None]:
    """Run a block with CPU random states of its own; python's, numpy's and torch's come back afterwards.

    Args:
        seed: Where to start within the block; None goes on from the present state.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        if seed is not None:
            seed_cpu(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_cpu(seed: tuple[int, ...]) -> None:
    """Seed python's, numpy's and torch's CPU generators from one tuple of non-negative numbers."""
    words = np.random.SeedSequence(seed).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] & 0xFFFFFFFF))
    # Not torch.manual_seed: that one would seed the devices as well.
    torch.default_generator.manual_seed(int(words[2] >> 1))


class SampleSeeding:
    """Attaches itself to a data loader and hands out one seed for each sample.

    The dataset and the batch sampler stay the same objects and keep their attributes; their classes are replaced by
    subclasses of the same name.  The loader gets a generator of its own, so that making an iterator (which draws the
    seed of the workers) leaves torch's global state alone.

    Args:
        loader: Data loader of training, before its first iterator is made.
        seed: Seed of the run.
        rank: Rank of this process.

    Attributes:
        position: Number of the next batch since the start of training.
        skip: Number of batches to leave out at the start of the next pass, without loading them.
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int) -> None:
        batches: Any = loader.batch_sampler
        self.seed = seed
        self.rank = rank
        self.position = 0
        self.skip = 0
        loader.generator = torch.Generator()
        self._generator = loader.generator
        sampler = getattr(batches, 'sampler', loader.sampler)
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            sampler.generator = loader.generator
        self.active = batches is not None and not isinstance(loader.dataset, IterableDataset)
        if self.active:
            try:
                loader.dataset.__class__ = _seeded_dataset(type(loader.dataset))  # type: ignore[arg-type]
                batches.__class__ = _seeded_batches(type(batches))  # type: ignore[arg-type]
            except TypeError:  # a built-in type such as list
                self.active = False
            else:
                batches.seeding = self

    def start_pass(self, epoch: int, position: int, skip: int = 0) -> None:
        """Set the number of the next batch that the sampler will yield, and how many to leave out after it."""
        self._generator.manual_seed(self.seed + epoch)
        self.position = position
        self.skip = skip

    def tag(self, batch: list) -> list:
        """Attach seeds to the indices of the next batch."""
        seeds = [(self.seed, self.rank, self.position, slot) for slot in range(len(batch))]
        return [
            SeededIndex(int(index), seed) if isinstance(index, int | np.integer) else index
            for index, seed in zip(batch, seeds, strict=True)
        ]


def _subclass(base: type, **attributes: Any) -> Any:
    """A subclass of ``base`` that looks like it, marked as seeded."""
    same = dict(__doc__=base.__doc__, __module__=base.__module__, __qualname__=base.__qualname__)
    return type(base.__name__, (base,), {**same, **attributes, '_is_seeded': True})


@cache
def _seeded_dataset(base: Any) -> Any:
    if hasattr(base, '_is_seeded'):
        return base

    def getitem(self: Any, index: Any) -> Any:
        if not isinstance(index, SeededIndex):
            return base.__getitem__(self, index)
        if get_worker_info() is not None:  # the states of a worker serve nothing else
            seed_cpu(index.seed)
            return base.__getitem__(self, int(index))
        with isolated_rng(index.seed):
            return base.__getitem__(self, int(index))

    def reduce_ex(self: Any, protocol: int) -> tuple:
        plain = base.__new__(base)
        plain.__dict__.update(self.__dict__)
        return _restore_seeded, (plain,)

    # torch prefers __getitems__ to __getitem__ where it is there.
    return _subclass(base, __getitem__=getitem, __getitems__=None, __reduce_ex__=reduce_ex)


def _restore_seeded(plain: Any) -> Any:
    plain.__class__ = _seeded_dataset(type(plain))  # type: ignore[arg-type]
    return plain


@cache
def _seeded_batches(base: Any) -> Any:
    if hasattr(base, '_is_seeded'):
        return base

    def iterate(self: Any) -> Iterator[list]:
        seeding: SampleSeeding = self.seeding
        for batch in base.__iter__(self):
            if seeding.skip > 0:
                seeding.skip -= 1
            else:
                yield seeding.tag(copy.copy(batch))
            seeding.position += 1

    return _subclass(base, __iter__=iterate)
