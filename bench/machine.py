"""Shared by the benchmarks: a timer, a call in a fresh process, and this machine's measured peak rates."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if CUDA else (torch.device("cpu"), torch.float32)


def clock(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rates() -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of reading memory), the best of ten."""
    size = 8192 if CUDA else 2048  # large enough to keep the device busy for longer than a launch takes
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    b = torch.ones(2**31 if CUDA else 2**26, device=DEVICE, dtype=DTYPE)
    product, read = (min(clock(run) for _ in range(10)) for run in (lambda: a @ a, b.sum))
    flops = 2 * size**3 / product
    print(f"{flops / 1e9:,.0f} GFLOP/s, {b.nbytes / read / 1e9:.1f} GB/s")
    return flops, b.nbytes / read


def apart(function: Callable, *args: Any) -> Any:
    """The result of a call in a fresh process, so that each contender's memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)
