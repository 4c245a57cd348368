"""The source of draws: global generators, and recorded values in their order."""

import pickle
import random

import numpy as np
import pytest
import torch

from boltz_mm.datasets.transforms.draws import Draws, RecordedDraws


def _some(draws: Draws) -> list[float]:
    return [
        draws.random(),
        draws.uniform(2, 3),
        draws.choice([5, 7, 9]),
        draws.weighted_index([0.2, 0.8]),
        draws.randint(3, 4),
        draws.numpy_uniform(0, 1),
        draws.torch_randint(0, 10),
    ]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_draws_follow_the_seeds_of_all_three_generators():
    _seed(3)
    first = _some(Draws())
    _seed(3)
    assert _some(Draws()) == first
    _seed(4)
    assert _some(Draws()) != first


def test_ranges():
    draws = Draws()
    assert {draws.randint(3, 4) for _ in range(50)} == {3, 4}
    assert {draws.torch_randint(3, 5) for _ in range(50)} == {3, 4}
    assert {draws.weighted_index([0, 1]) for _ in range(20)} == {1}


def test_recorded_draws_come_back_in_order_and_end():
    values = [0.25, 2.5, 7.0, 1.0, 4.0, 0.75, 9.0]
    draws = RecordedDraws(values)
    assert _some(draws) == values
    assert draws.left == 0
    with pytest.raises(ValueError, match='7 recorded draws'):
        draws.random()


def test_recorded_integers_are_integers():
    draws = RecordedDraws([7.0, 0.5])
    assert isinstance(draws.choice([5, 7]), int)
    assert draws.choice([0.5, 1]) == 0.5


def test_draws_travel_to_worker_processes():
    draws = pickle.loads(pickle.dumps(RecordedDraws([1.0, 2.0])))
    assert draws.left == 2
