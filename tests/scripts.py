"""How tests run the project's scripts, in this process or in others, and read what they wrote."""

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

import torch

from common.files import ROOT
from core import trainer
from tiny import first_pairs
from train_dpl import DPLConfig, objective

SOCIETY = "data/society/reference"

# ---- in this process


def call(script, *words, **flags):
    """Run main() of a script (a module, or its file's name) as a command line of `words` and `flags` does.

    A flag that is True has no value, one that is a list has several.
    """
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words = (*words, f"--{name}", *values)
    script = importlib.import_module(script.removesuffix(".py")) if isinstance(script, str) else script
    with patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, words)]):
        return script.main()


def read_lines(path):
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def rows_of(folder):
    """Rows of a run's metrics.jsonl, without clocks and memory."""
    rows = read_lines(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]


def train(script, *words, **flags):
    """call(), and the rows of metrics.jsonl that it wrote."""
    call(script, *words, **flags)
    return rows_of(flags["out_dir"])


def run_dpl(config, **options):
    """Train on a DPLConfig, and the rows of metrics.jsonl."""
    trainer.train(config, options.pop("objective", partial(objective, config=config)), **options)
    return rows_of(config.out_dir)


def society_config(folder, pairs, **flags):
    """DPL on the society's first `pairs` test pairs, in folder/run."""
    data = first_pairs("test", pairs, folder / "rows.jsonl")
    return DPLConfig(data=str(data), **{"model": SOCIETY, "out_dir": str(folder / "run")} | flags)


# ---- in other processes


def free_port():
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def be_one_of_many(rank, world, port):
    """Set what torchrun sets for a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def start_processes(target, arguments):
    """Start a process for each tuple of arguments, as forks of one import of the scripts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts", "train_reward", "sample", "evaluate"])
    processes = [context.Process(target=target, args=some) for some in arguments]
    for process in processes:
        process.start()
    return processes


def _script(rank, world, port, words, folder, log):
    os.chdir(folder)
    for name in ("stdout", "stderr"):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY), getattr(sys, f"__{name}__").fileno())
    if world > 1:
        be_one_of_many(rank, world, port)
    torch.set_num_threads(1)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run_script(world, *words, folders=None):
    """Run one of the project's scripts as torchrun would, but that its processes are forks of one import.

    Returns its exit codes, and what it wrote to stdout and stderr. Process i runs in folders[i].
    """
    port, log, folders = free_port(), tempfile.mkdtemp(), folders or [ROOT] * world
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    arguments = [(rank, world, port, words, folders[rank], f"{log}/{rank}") for rank in range(world)]
    processes = start_processes(_script, arguments)
    wait([process.sentinel for process in processes])
    failed = [process for process in processes if process.exitcode]
    for process in processes:
        process.join(3 if failed else 120)  # torchrun ends the others too
        process.kill()
        process.join()
    paths = (sorted(Path(log).glob(f"*.{name}")) for name in ("stdout", "stderr"))
    return [p.exitcode for p in processes], *("".join(path.read_text() for path in some) for some in paths)


def torchrun(*words):
    """Run one of the project's scripts on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *words]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
