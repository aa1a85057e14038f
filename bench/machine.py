"""Shared by the benchmarks: timers, calls in another process, and this machine's measured peak rates."""

import faulthandler
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from core.attention import compile_once

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if CUDA else (torch.device("cpu"), torch.float32)
SPAWN = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process


def clocks(run: Callable[[], Any]) -> tuple[float, float]:
    """(seconds until a call returns, seconds until the GPU has done what it asked for)."""
    began = time.perf_counter()
    run()
    returned = time.perf_counter() - began
    if CUDA:
        torch.cuda.synchronize()
    return returned, time.perf_counter() - began


def clock(run: Callable[[], Any]) -> float:
    """Seconds that a call takes, on the GPU too."""
    return clocks(run)[1]


def product_rate() -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    size = 8192 if CUDA else 2048  # large enough to keep the device busy for longer than a launch takes
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    return 2 * size**3 / min(clock(lambda: a @ a) for _ in range(10))


@functools.cache
def rates() -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of reading memory), the best of ten."""
    flops, b = product_rate(), torch.ones(2**31 if CUDA else 2**26, device=DEVICE, dtype=DTYPE)
    read = b.nbytes / min(clock(b.sum) for _ in range(10))
    print(f"{flops / 1e9:,.0f} GFLOP/s, {read / 1e9:.1f} GB/s")
    return flops, read


def apart(function: Callable, *args: Any) -> Any:
    """The result of a call in a fresh process, so that each contender's memory is its own."""
    with SPAWN.Pool(1) as pool:
        return pool.apply(function, args)


# ---- calls that may fail


def guard(errors: Path, limit: float) -> Callable[[Callable[[], str]], tuple[bool, str, str]]:
    """A function that makes calls in another process: (whether it succeeded, its result, its stderr).

    The result of a failure is the exception's type and message, or how the process ended: a call may crash it
    or take more than `limit` seconds. One process serves all calls until that happens, or until a call breaks
    CUDA, which stays broken in its process; the next call then gets a new one. What it prints, and what child
    processes write to stderr, is appended to the file `errors`.
    """
    process = pipe = None

    def call(function: Callable[[], str]) -> tuple[bool, str, str]:
        nonlocal process, pipe
        if process is None:
            pipe, other = SPAWN.Pipe()
            process = SPAWN.Process(target=_serve, args=(other, errors), daemon=True)
            process.start()
            other.close()  # without a copy here, a dead process is noticed
        start = errors.stat().st_size if errors.exists() else 0
        try:
            pipe.send(function)
            if not pipe.poll(limit):
                raise TimeoutError
            succeeded, result, alive = pipe.recv()
        except (OSError, EOFError) as error:
            succeeded = alive = False
            if hung := isinstance(error, TimeoutError):
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes where it hangs
            process.join(10)
            code = process.exitcode
            result = f"no answer in {limit:.0f} s" if hung else f"its process died with exit code {code}"
        if not alive:
            process.kill()
            process.join()
            process = None
        written = errors.read_bytes()[start:] if errors.exists() else b""
        return succeeded, result, written.decode(errors="replace")

    return call


def _serve(pipe: Connection, errors: Path) -> None:
    """Answer the calls that arrive; each finds compiler and memory as in a new process."""
    with errors.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr
    faulthandler.enable(all_threads=False)
    alive = True
    while alive:
        try:
            function = pipe.recv()
        except EOFError:  # nobody asks any more
            return
        compile_once.cache_clear()  # it holds models
        torch._dynamo.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        try:
            answer = True, function()
        except Exception as error:
            if not isinstance(error, subprocess.SubprocessError):  # a child process wrote its own
                traceback.print_exc()
            answer = False, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            alive = cuda_works()
        sys.stderr.flush()
        pipe.send((*answer, alive))


def cuda_works() -> bool:
    """False after an error that CUDA does not recover from, such as an illegal memory access."""
    try:
        if CUDA:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
