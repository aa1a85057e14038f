"""Kill a run at random moments, resume it each time, and compare its end with the run that nobody killed.

One process is killed at random times and in the middle of checkpoint writes; of two processes, one or both.
What one process ends with (the adapter, every row of metrics.jsonl) must be the undisturbed run's to the bit;
what two end with must be within 1e-5 of it, since they add up the gradient in another order.

    python tests/kill_resume.py               # 25 kills, several minutes
    python tests/kill_resume.py --kills 4     # about a minute
"""

import argparse
import contextlib
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FLAGS = "@recipes/society.txt --batch_size 8 --max_steps 40 --lr 1e-3 --save_every 2 --log_every 1 "
FLAGS += "--eval_every 20 --resume"
CLOCKS = ("examples_per_second", "tokens_per_second", "peak_memory_gb")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# name: (Python's arguments before the script, the script's flags)
KINDS = {
    "one process": ((), ()),
    "two processes, ddp": (TWO, ()),
    "two processes, fsdp": (TWO, ("--parallel", "fsdp")),
}


def start(kind: str, data: Path, out: Path) -> subprocess.Popen:
    """Start the run of `out`, or go on with it."""
    launcher, flags = KINDS[kind]
    files = ("--data", data, "--eval_data", data, "--out_dir", out)
    command = [sys.executable, *launcher, "train_dpl.py", *FLAGS.split(), *map(str, files), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run that must end well."""
    _, errors = process.communicate(timeout=300)
    if process.returncode:
        sys.exit(f"a run ended with code {process.returncode}:\n{errors}")


def kill(process: subprocess.Popen, everyone: bool, draw: random.Random) -> None:
    """SIGKILL to all processes of a run, or to one of torchrun's, at which torchrun must end the rest."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children]
    for victim in [process.pid, *ranks] if everyone or not ranks else [draw.choice(ranks)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)


def hurt(kind: str, data: Path, out: Path, kills: int, seconds: float, draw: random.Random) -> None:
    """Kill a run of about `seconds` again and again, then let it finish; one that ends first starts anew."""
    done = 0
    while done < kills:
        process, inside = start(kind, data, out), draw.random() < 0.5
        moment = time.monotonic() + draw.uniform(0.2, 1) * seconds
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.001)
        # a hidden folder is a checkpoint half written
        while inside and process.poll() is None and not any((out / "checkpoint").glob(".*")):
            time.sleep(0.0002)
        if process.poll() is not None:
            finish(process)
            shutil.rmtree(out)
            continue
        kill(process, draw.random() < 0.5, draw)
        done += 1
        left = ", ".join(sorted(path.name for path in (out / "checkpoint").glob("*"))) or "no checkpoint"
        print(f"  kill {done:2}, {'in a write' if inside else 'any moment'}: left {left}", flush=True)
    finish(start(kind, data, out))


def results(out: Path) -> tuple[bytes, list[dict]]:
    """The final adapter's bytes, and metrics.jsonl without clocks."""
    with open(out / "metrics.jsonl") as file:
        rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in file]
    return (out / "adapter_model.safetensors").read_bytes(), rows


def distance(found: Path, wanted: Path) -> float:
    """Largest difference between two runs' losses or final weights; infinite if a step is missing."""
    rows = [results(out)[1] for out in (found, wanted)]
    if [row["step"] for row in rows[0]] != [row["step"] for row in rows[1]]:
        return float("inf")
    losses = [abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(*rows, strict=True)]
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (found, wanted))
    return max(*losses, *((ours[name] - theirs[name]).abs().max().item() for name in theirs))


def main() -> None:
    """Every kind of run, `--kills` kills in all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, each = random.Random(args.seed), args.kills // 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with gzip.open(ROOT / "data/society/test.jsonl.gz", "rt") as lines:
            (folder / "rows.jsonl").write_text("".join(itertools.islice(lines, 60)))
        whole, began = folder / "undisturbed" / "run", time.monotonic()
        finish(start("one process", folder / "rows.jsonl", whole))
        seconds = time.monotonic() - began
        for kind, kills in zip(KINDS, (args.kills - 2 * each, each, each), strict=True):
            print(f"{kind}: {kills} kills", flush=True)
            out = folder / kind / "run"  # beside it, a reference cache of its own
            hurt(kind, folder / "rows.jsonl", out, kills, 1.5 * seconds, draw)
            gap = distance(out, whole)
            if gap > 1e-5 or (kind == "one process" and results(out) != results(whole)):
                sys.exit(f"{kind}: the killed run ended elsewhere, {gap:.1g} away")
            print(f"  ended {gap:.1g} away from the undisturbed run", flush=True)


if __name__ == "__main__":
    main()
