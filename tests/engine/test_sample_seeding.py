"""Samples draw from seeds of their own; loaders and data sets stay what they were otherwise."""

import copy
import pickle
import random
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from boltz_mm.engine.sample_seeding import SampleSeeding, SeededIndex, isolated_rng, seed_cpu


class Draws(Dataset):
    """Each sample: its index and three draws."""

    def __init__(self, size=7):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert type(index) is int
        return index, random.random(), float(np.random.rand()), torch.rand(1).item()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


def _batches(workers=0, seed=3, rank=0, position=0, skip=0, context=None, **kwargs):
    loader = DataLoader(
        Draws(), batch_size=2, num_workers=workers, collate_fn=list, multiprocessing_context=context, **kwargs
    )
    SampleSeeding(loader, seed, rank).start_pass(0, position, skip)
    return list(loader)


def test_draws_follow_seed_rank_and_place():
    first = _batches()
    assert first == _batches() and len(first) == 4
    draws = [sample[1:] for batch in first for sample in batch]
    assert len(set(draws)) == 7
    for other in (_batches(seed=4), _batches(rank=1), _batches(position=4)):
        assert not set(draws) & {sample[1:] for batch in other for sample in batch}
    assert _batches(skip=3) == first[3:]
    assert [sample[1:] for sample in _batches(position=2)[0]] == [sample[1:] for sample in first[2]]


@pytest.mark.parametrize(
    ('workers', 'context'), [(1, 'fork'), (3, 'fork'), pytest.param(1, 'spawn', marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_workers_change_nothing(workers, context):
    assert _batches(workers, context=context) == _batches()


def test_shuffling_by_torch_follows_the_epoch():
    def order(epoch):
        loader = DataLoader(Draws(), batch_size=2, collate_fn=list, shuffle=True)
        SampleSeeding(loader, 3, 0).start_pass(epoch, 0)
        return [sample[0] for batch in loader for sample in batch]

    assert order(0) == order(0) != order(1)


def test_global_states_are_untouched():
    seed_cpu((1, 2))
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    seed_cpu((1, 2))
    _batches()
    with isolated_rng((5,)):
        random.random(), np.random.rand(), torch.rand(1)
    assert expected == (random.random(), np.random.rand(), torch.rand(1).item())


def test_data_set_keeps_name_attributes_and_pickles():
    loader = DataLoader(Draws(5), batch_size=2, collate_fn=list)
    SampleSeeding(loader, 3, 0)
    data = loader.dataset
    assert isinstance(data, Draws) and type(data).__name__ == 'Draws' and data.size == 5 and data[1][0] == 1
    index = SeededIndex(2, (3, 0, 0, 1))
    for other in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data), copy.copy(data)):
        assert other.size == 5 and other[index] == data[index]
        other.size = 6
        assert data.size == 5
    again = pickle.loads(pickle.dumps(index))
    assert again == 2 and again.seed == index.seed


def test_what_cannot_be_seeded_is_left_alone():
    for source in (Stream(), [1, 2, 3, 4]):
        loader = DataLoader(source, batch_size=2)
        seeding = SampleSeeding(loader, 3, 0)
        seeding.start_pass(0, 0)
        assert not seeding.active and len(list(loader)) == 2


def test_cost_of_a_sample_is_small():
    seed_cpu((0,))
    begin = time.perf_counter()
    for place in range(200):
        with isolated_rng((3, 0, place, 1)):
            pass
    assert (time.perf_counter() - begin) / 200 < 2e-3  # measured about 0.1 ms; decoding an image takes several ms
