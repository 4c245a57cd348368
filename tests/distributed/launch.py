"""Run a function in several gloo processes of this machine, with a time limit and no process left over."""

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp


class RankError(AssertionError):
    """A rank failed or did not end in time; carries its traceback."""


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` in each of `world_size` processes that form a gloo group.

    Args:
        function: Importable function; its results must be picklable.
        args: Its arguments.
        world_size: Number of processes.
        timeout: Seconds for all of it.

    Returns:
        The results in the order of the ranks.

    Raises:
        RankError: As soon as one rank fails, or when time is up; the others are ended.
    """
    context = mp.get_context('spawn')
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world_size, port, answers), daemon=False)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, answers, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(processes: list, answers: Any, limit: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        try:
            rank, good, value = answers.get(timeout=0.5)
        except queue.Empty:
            silent = [rank for rank, process in enumerate(processes) if process.exitcode and rank not in results]
            if silent or time.monotonic() > limit:
                for process in processes:
                    process.kill()
                codes = [process.exitcode for process in processes]
                raise RankError(f'no answer from all ranks, exit codes {codes}') from None
            continue
        if not good:
            for process in processes:
                process.kill()
            raise RankError(f'rank {rank}:\n{value}')
        results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _rank(function: Callable, args: tuple, rank: int, world_size: int, port: int, answers: Any) -> None:
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group('gloo', rank=rank, world_size=world_size, timeout=timedelta(seconds=90))
        value = function(*args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    else:
        answers.put((rank, True, value))
