"""Many processes: who this one is, sums over all of them, and one clear line when one fails.

torchrun starts one process a device and tells each its place (RANK, LOCAL_RANK, WORLD_SIZE). Every process
reads the same data and knows the same batch, takes its share of the pairs, and sums what must be summed.
Without torchrun there is one process, rank 0 of 1, and nothing is sent.
"""

import atexit
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from files import InputError, complain


def rank() -> int:
    """This process's number; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device() -> torch.device:
    """This process's GPU, or the CPU where there is none. Raises InputError if there are too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
        raise InputError(f"--nproc_per_node: more processes than GPUs ({count})")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@functools.cache
def _join() -> dist.Store:
    """Meet the other processes, once; returns the store of keys that all of them see."""
    store, number, count = next(dist.rendezvous("env://"))
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=number, world_size=count, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=number, world_size=count)
    atexit.register(dist.destroy_process_group)
    return store


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Run the block as one of torchrun's processes, if torchrun started this one; only rank 0 prints.

    The first process with bad input says so and exits with code 2, at which torchrun ends the others; those
    that find the same, or lose the connection because of it, exit silently. Restores signal handlers.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    store = _join() if "RANK" in os.environ else None
    torch.set_flush_denormal(True)  # gradients near 1e-38, of saturated losses, make a CPU six times slower
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except (InputError, OSError, RuntimeError) as error:
        ours = not isinstance(error, RuntimeError)  # RuntimeError: what a lost connection raises
        failures = store.add("failures", int(ours)) if store else 0
        if not failures:
            raise
        if ours and failures == 1:
            complain(error)
        sys.stdout.flush()
        os._exit(2)  # at once: the usual way out would wait for processes that wait for this one
    finally:
        torch.set_flush_denormal(False)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def note_signals() -> list[int]:
    """Until joined() ends, SIGTERM and SIGINT are only recorded, in the list returned."""
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: caught.append(number))
    return caught


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, where the tensor is."""
    if world() == 1:
        return tensor
    total = tensor.to(own_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def gathered(value: Any) -> list[Any]:
    """A small value of every process, by rank. No process gets past this before all have reached it."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up whole gradients over all processes, in place, in one message."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(total)
    for gradient, found in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(found.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process; any other as it is. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
