"""Processes of their own. They are forked from a server that has imported torch, which takes longer than most tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # with an optimizer, if not before
import torch.distributed as dist
import torch.distributed.fsdp

WORLD = 2
CONTEXT = multiprocessing.get_context("forkserver")
# What works in them; what cannot be imported is left out.
CONTEXT.set_forkserver_preload(
    [
        "tests.accumulate.test_distributed",
        "tests.controller.test_resume",
        "tests.studies.test_studies",
        "torchdata.stateful_dataloader",
        "lightning.pytorch",
        "transformers.trainer",
    ]
)


def spawn(work: Callable[..., Any], folder: Path, *args: Any, world: int = WORLD, timeout: float = 300.0) -> list[Any]:
    """What ``work(rank, *args)`` returns on each rank of a gloo group, in a process of its own."""
    start_ranks(work, folder, *args, world=world, timeout=timeout)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start_ranks(work: Callable[..., Any], folder: Path, *args: Any, world: int = WORLD, timeout: float = 300.0) -> None:
    """Run ``work(rank, *args)`` on each rank; ranks may die before they return."""
    entry = (work, str(folder), world, timeout, args)
    torch.multiprocessing.start_processes(_enter, entry, nprocs=world, start_method="forkserver")


def _enter(rank: int, work: Callable[..., Any], folder: str, world: int, timeout: float, args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    # The result is written. Threads that fully_shard started race the interpreter's end: one run in ten aborted there.
    os._exit(0)


def start(work: Callable[..., object], *args: Any) -> BaseProcess:
    """``work(*args)`` in a process that may be killed."""
    process = CONTEXT.Process(target=work, args=args)
    process.start()
    return process
