"""Two CPU processes with gloo, a batch for each, and what a model of one process makes of the batches."""

from __future__ import annotations

import functools
import os
import socket
import sys
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers import adapted, adapter_gradients, padded, tiny_llama

WORLD = 2
PRELOADED = [
    "two_processes", "trainer_tools", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp",
    "torch._dynamo", "torch.distributed.tensor.parallel",
]  # fmt: skip

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def process(rank: int, port: int, job: Any, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(WORLD))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        torch.save(job(rank, directory), f"{directory}/{rank}.pt")
        dist.barrier()  # nobody leaves while another still reads from it
    finally:
        dist.destroy_process_group()
    # Without Python's shutdown, in which one process was once aborted ("terminate called without an active exception").
    # Read off that message, not reproduced: a thread of gloo that outlives the group (FSDP's mesh keeps it) and asks for the
    # interpreter then is killed by it, which C++ answers with abort().
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@functools.cache
def start_fork_server() -> None:
    """With this process's import path, which Python before 3.13 does not hand on: what is to be imported would not be found, and
    nobody would be told."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def on_two(job: Any, directory: Any) -> list[Any]:
    """What `job(rank, directory)` returns in each of two processes.

    They are forks of a process that has imported everything and done nothing (a fork server, one for each worker of pytest): an
    import of all that Transformers brings takes longer than the tests.
    """
    start_fork_server()
    mp.start_processes(process, (free_port(), job, str(directory)), nprocs=WORLD, start_method="forkserver")
    return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    return padded([7, 5] if rank == 0 else [4, 6, 2], seed=rank)


def alone(config: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    found = []
    for rank in range(WORLD):
        model = adapted(tiny_llama(), **config).train()
        model(**batch_of(rank)).loss.backward()
        found.append(adapter_gradients(model))
    return found
