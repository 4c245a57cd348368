"""The store of what depends on the image size alone."""

import copy
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from boltz_mm.models.layers.size_cache import SizeCache

CPU = torch.device('cpu')


def test_computes_once_and_drops_what_was_not_used_for_longest() -> None:
    cache, made = SizeCache(maxsize=2), []

    def make(key: int) -> torch.Tensor:
        made.append(key)
        return torch.tensor(key)

    for key in (1, 2, 1, 3, 1, 2):
        assert cache.get(key, CPU, lambda key=key: make(key)) == key
    assert made == [1, 2, 3, 2]
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(ValueError, match='maxsize must be positive, got 0'):
        SizeCache(0)


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_are_empty_and_separate(copied) -> None:
    cache = SizeCache(3)
    cache.get('a', CPU, lambda: torch.ones(1))
    other = copied(cache)
    assert (len(other), other.maxsize) == (0, 3)
    assert other.get('a', CPU, lambda: torch.zeros(1)) == 0
    assert cache.get('a', CPU, lambda: torch.zeros(1)) == 1


def test_values_made_in_inference_mode_serve_training() -> None:
    cache = SizeCache()
    factor = torch.tensor(2.0, requires_grad=True)
    with torch.inference_mode():
        cache.get('a', CPU, lambda: (torch.ones(2),))
    value = cache.get('a', CPU, lambda: (torch.zeros(2),))[0]
    assert not value.is_inference()
    (value * factor).sum().backward()
    assert factor.grad == 2
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert cache.get('b', CPU, lambda: torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_fake_tensors_are_not_kept() -> None:
    cache = SizeCache()
    with FakeTensorMode():
        cache.get('a', CPU, lambda: torch.ones(2))
    assert len(cache) == 0


def test_compiled_functions_bypass_it() -> None:
    cache = SizeCache()

    @torch.compile(fullgraph=True, backend='eager')
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + cache.get(x.shape[0], x.device, lambda: torch.arange(x.shape[0]))

    assert function(torch.ones(3)).tolist() == [1, 2, 3]
    assert len(cache) == 0


def test_threads_share_the_first_value() -> None:
    cache, barrier, seen = SizeCache(), threading.Barrier(4), []

    def make() -> torch.Tensor:
        barrier.wait(timeout=10)  # all four have missed
        return torch.ones(1)

    threads = [threading.Thread(target=lambda: seen.append(cache.get('a', CPU, make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(seen) == 4
    assert len({id(value) for value in seen}) == 1
