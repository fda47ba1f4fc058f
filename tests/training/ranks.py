"""Several processes of one run: forked from the test's, which has imported and compiled everything already."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.cli import run

# Seconds, for a machine with much else to do; and those that processes get to end after another has.
TIMEOUT, PATIENCE = 600, 30

needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process can't use CUDA")


def call_in_two(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in two processes; see :func:`call_in`."""
    return call_in(2, function, *arguments)


def call_in(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in several processes that find what torchrun would have set.

    Args:
        count: Number of processes.
        function: Called with `arguments` in all processes. What it returns or raises must be picklable.
        arguments: Arguments of the function.

    Returns:
        What the function returned, by rank.

    Raises:
        AssertionError: A process ended without an answer, or gave none in time.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    receivers, processes = [], []
    try:
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            processes.append(context.Process(target=_answer, args=(rank, count, port, sender, function, arguments)))
            processes[-1].start()
            sender.close()  # so that it ends with the process
            receivers.append(receiver)
        return [_receive(rank, receiver) for rank, receiver in enumerate(receivers)]
    except AssertionError:
        for process in processes:  # which may still meet what another one's end leads to
            process.join(PATIENCE)
        raise
    finally:
        for process in processes:
            process.kill()
            process.join()


def train_in_two(config: Any) -> dict[str, Any]:
    """Run `qlora train` in two processes; return its report, of which there is one, not two."""
    return train_in(2, config)


def train_in(count: int, config: Any, *options: str) -> dict[str, Any]:
    """Run `qlora train` in several processes; return its report, of which there is one."""
    first, *others = call_in(count, run, "train", config, *options, "--json")
    assert [(other.code, other.out) for other in others] == [(0, "")] * (count - 1), others[0].err
    return first.json()


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answer(
    rank: int, count: int, port: int, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Call the function as a process of its rank, and send what it returns."""
    values = {
        "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in values.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the test's single process
    sender.send(function(*arguments))


def _receive(rank: int, receiver: Connection) -> Any:
    assert receiver.poll(TIMEOUT), f"process {rank} sent nothing in {TIMEOUT} s"
    try:
        return receiver.recv()
    except EOFError:
        raise AssertionError(f"process {rank} ended without an answer") from None
