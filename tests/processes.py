"""Processes of a test's own, forked from one that has imported torch and transformers, but nothing of ours."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess

import torch.multiprocessing
from torch.distributed import TCPStore

PATIENCE = 500.0
"""Seconds that a test waits for other processes; they start in a few, but a busy machine may give them little time."""


@functools.cache
def fresh() -> ForkServerContext:
    """Each starts in a fraction of a second; a spawned one spends most of five on those imports."""
    context: ForkServerContext = torch.multiprocessing.get_context("forkserver")
    imports = ["torch", "peft", "accelerate", "transformers.models.llama.modeling_llama", "hypothesis"]
    context.set_forkserver_preload(imports)
    return context


@contextmanager
def rendezvous(count: int) -> Iterator[list[dict[str, str]]]:
    """Environment of each of so many processes that train together on the CPU, as `torchrun` sets it.

    Their store is kept here, as `torchrun` does: a port that is free now may be taken before a process listens there.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def exit_codes(processes: Sequence[ForkServerProcess]) -> list[int | None]:
    """Exit codes of processes that run together; all end as soon as one fails, or none ends for `PATIENCE` seconds."""
    running = {process.sentinel for process in processes}
    while running:
        ended = wait(running, PATIENCE)
        running -= set(ended)
        if not ended or any(process.exitcode for process in processes):
            break
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
