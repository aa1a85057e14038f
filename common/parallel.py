"""torchrun, DDP and FSDP: which process this is, collectives over all processes, and sharding the model.

torchrun starts one process per device and tells each its place (RANK, LOCAL_RANK, WORLD_SIZE). Every process
reads the same data and knows the same global batch, takes its share of the pairs, and the gradients are
summed over all processes. Without torchrun there is one process, rank 0 of 1, and nothing is sent.

    torchrun --nproc_per_node 8 train_dpl.py                      # DDP: each process holds the whole model
    torchrun --nproc_per_node 8 train_dpl.py --parallel fsdp      # FSDP2: each holds an eighth of it
"""

import atexit
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.files import InputError, print_error, release_locks

BUCKET = 2**26  # gradients that travel in one all_reduce: 256 MB in float32
TIMEOUT = timedelta(hours=1)  # for a collective: rank 0 may be writing a large checkpoint meanwhile


def get_rank() -> int:
    """This process's number. Only rank 0 prints, and writes all files but FSDP's checkpoints."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_device() -> torch.device:
    """This process's GPU, or the CPU if there is none. Raises InputError if there are too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
        raise InputError(f"--nproc_per_node: more processes than GPUs ({count})")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def get_dtype() -> torch.dtype:
    """The dtype for models that are not trained: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if get_device().type == "cuda" else torch.float32


@functools.cache
def _init_process_group() -> dist.Store:
    """Connect to the other processes, once; returns torch.distributed's key-value store."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # all_gather's objects travel by gloo
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    atexit.register(dist.destroy_process_group)
    return store


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Run the block in torchrun's process group, if torchrun started this process; only rank 0 prints.

    If one process raises InputError, it prints the message and exits with code 2; torchrun then ends the
    others. Processes that raise the same error, or lose the connection because of it, exit silently.
    At the end, locks are released and signal handlers restored.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    store = _init_process_group() if "RANK" in os.environ else None
    torch.set_flush_denormal(True)  # denormal gradients (1e-38, saturated losses) are six times slower on x86
    try:
        with open(os.devnull, "w") as devnull, contextlib.ExitStack() as stack:
            if get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(devnull))
            yield
    except (InputError, OSError, RuntimeError) as error:
        input_error = not isinstance(error, RuntimeError)  # a lost connection raises RuntimeError
        failures = store.add("failures", int(input_error)) if store else 0
        if not failures:
            raise
        if input_error and failures == 1:
            print_error(error)
        sys.stdout.flush()
        os._exit(2)  # sys.exit would wait for processes that wait for this one
    finally:
        release_locks()
        torch.set_flush_denormal(False)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def record_signals() -> list[int]:
    """Make SIGTERM and SIGINT append their number to the returned list, until distributed() ends."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return received


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The CPU does not wait for the copy to a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the tensor's own device."""
    if get_world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_gather(value: Any) -> list[Any]:
    """A Python value from every process, in order of rank."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process has come here."""
    if get_world_size() > 1:
        dist.barrier()


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place: one all_reduce for every BUCKET elements.

    An adapter is one bucket. All weights of a large model would not fit a second time.
    """
    if get_world_size() == 1:
        return
    buckets, size = [], BUCKET
    for gradient in (p.grad for p in parameters if p.grad is not None):
        if size + gradient.numel() > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    for bucket in buckets:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; any other tensor unchanged. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: modules whose class transformers lists in `_no_split_modules`."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """In the block each process holds all weights, and may run as many forward passes as it needs."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def shard(model: nn.Module, device: torch.device, mixed: bool) -> None:
    """Shard a model that is on the CPU over all processes with FSDP2, in place, onto `device`.

    Blocks are moved and sharded one at a time, so the whole model need not fit on one device. If `mixed`,
    weights are gathered in bfloat16 and gradients are summed in float32.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for module in [*decoder_layers(model), model]:
        # reshard the root too: by default FSDP2 keeps it whole after a forward, and a checkpoint needs shards
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a sum: losses are divided by the global batch already
        module.set_force_sum_reduction_for_comms(True)
