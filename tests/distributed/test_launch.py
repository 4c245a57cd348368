"""The helper of the two-process tests: results, failures and hanging ranks."""

import time

import pytest
import torch

from tests.distributed.launch import RankError, run_ranks


def total(value):
    tensor = torch.tensor(float(torch.distributed.get_rank() + value))
    torch.distributed.all_reduce(tensor)
    return tensor.item()


def fail_on_second():
    if torch.distributed.get_rank() == 1:
        raise ValueError('the second rank is out of order')
    torch.distributed.barrier()


def sleep_on_second():
    time.sleep(600 * torch.distributed.get_rank())
    torch.distributed.barrier()


@pytest.mark.slow
def test_results_of_all_ranks():
    assert run_ranks(total, 10) == [21.0, 21.0]


@pytest.mark.slow
def test_failure_ends_all_at_once_with_its_traceback():
    begin = time.monotonic()
    with pytest.raises(RankError, match='rank 1(?s:.*)the second rank is out of order'):
        run_ranks(fail_on_second)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_time_limit():
    with pytest.raises(RankError, match='no answer'):
        run_ranks(sleep_on_second, timeout=15)
