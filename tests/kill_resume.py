"""Kill runs at random moments, resume each until it ends, and compare it with the run that nobody killed.

Every script, one process or two, a run that overwrites another, and two processes that want one folder. A
kill comes at a random time, or in the middle of a write. What one process ends with (adapter, rows of
metrics.jsonl, samples) must be the undisturbed run's to the bit; what two processes end with must be within
1e-5 of it, since they add up the gradient in another order.

    python tests/kill_resume.py               # 100 kills, half an hour
    python tests/kill_resume.py --kills 3     # one of each of the first three kinds, a minute
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
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TRAIN = "@recipes/society.txt --batch_size 8 --max_steps 40 --lr 1e-3 "
TRAIN += "--save_every 2 --log_every 1 --eval_every 20"
RL = "--num_samples 8 --max_new_tokens 24 --batch_size 5 --max_steps 20 --sample_batch_size 64"
SAMPLE = "--model data/society/reference --num_samples 8 --batch_size 8 --prompts data/society/prompts.jsonl"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# name: (Python's arguments before the script, the script, its own flags)
KINDS = {
    "train_dpl.py": ((), "train_dpl.py", ()),
    "overwriting": ((), "train_dpl.py", ()),
    "two at once": ((), "train_dpl.py", ()),
    "two processes, fsdp": (TWO, "train_dpl.py", ("--parallel", "fsdp")),
    "sample.py": ((), "sample.py", ()),
    "two processes, ddp": (TWO, "train_dpl.py", ()),
    "train_mallows.py": ((), "train_mallows.py", ()),
    "train_reward.py": ((), "train_reward.py", ()),
    "train_sft.py": ((), "train_sft.py", ()),
    "train_rl.py": ((), "train_rl.py", ()),
}


def start(kind: str, folder: Path, out: Path, *more: str) -> list[subprocess.Popen]:
    """Start the run of `out`, or go on with it; "two at once" starts it twice."""
    launcher, script, flags = KINDS[kind]
    if script == "sample.py":
        words = [*SAMPLE.split(), "--out_file", out / "samples.jsonl"]
    else:
        data = folder / ("completions.jsonl" if script == "train_sft.py" else "rows.jsonl")
        words = [*TRAIN.split(), "--data", data, "--eval_data", data, "--out_dir", out]
        if script == "train_rl.py":
            data = ROOT / "data/society/prompts.jsonl"  # whose reward is known
            words = [*words, *RL.split(), "--data", data, "--eval_data", data]
    command = [sys.executable, *launcher, script, *words, *flags, *(more or ("--resume",))]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(1 + (kind == "two at once"))]


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for a run that must end well. Of two at once, one may be refused."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    failed = [error for process, error in zip(processes, errors, strict=True) if process.returncode]
    refused = [error for error in failed if "writes there: wait until it ends" in error.splitlines()[-1]]
    if len(failed) > len(refused) or len(refused) == len(processes):
        sys.exit("a run ended badly:\n" + "\n".join(failed))


def kill(processes: list[subprocess.Popen], everyone: bool, draw: random.Random) -> None:
    """SIGKILL to all processes of a run, or to one of torchrun's, at which torchrun must end the rest."""
    for process in processes:
        with contextlib.suppress(FileNotFoundError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks = [int(child) for child in children]
            for victim in [process.pid, *ranks] if everyone or not ranks else [draw.choice(ranks)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=120)


def hurt(
    kind: str, folder: Path, out: Path, old: Path, kills: int, seconds: float, draw: random.Random
) -> Iterator[str]:
    """Kill a run of about `seconds` again and again, then let it finish; one that ends first starts anew.

    A run that overwrites begins with a copy of the run in `old`. Yields a line for each kill.
    """

    def writes() -> bool:
        if kind == "overwriting" and not any(path.name > "000002" for path in out.glob("checkpoint/*")):
            return (out / "run.json").read_bytes() != (old / "run.json").read_bytes()
        return any(out.glob("checkpoint/.*")) or any(out.glob(".samples.jsonl.[0-9]*"))  # half written

    done, flags = 0, ()
    while done < kills:
        if kind == "overwriting" and not out.exists():
            shutil.copytree(old, out)
            flags = ("--overwrite",)
        processes, inside = start(kind, folder, out, *flags), draw.random() < 0.5
        flags = ()
        moment = time.monotonic() + draw.uniform(0.2, 1) * seconds
        while processes[0].poll() is None and time.monotonic() < moment:
            time.sleep(0.001)
        while inside and processes[0].poll() is None and not writes():
            time.sleep(0.0002)
        if processes[0].poll() is not None:
            if kind == "overwriting" and "the run to --resume had" in (error := processes[0].stderr.read()):
                flags = ("--overwrite",)  # it was killed before it changed anything
                assert error.count("\n") == 1
                continue
            finish(processes)
            shutil.rmtree(out)
            continue
        kill(processes, draw.random() < 0.5, draw)
        done += 1
        left = ", ".join(sorted(path.name for path in out.glob("checkpoint/*"))) or "no checkpoint"
        yield f"  kill {done:2}, {'in a write' if inside else 'any moment'}: left {left}"
    if kind == "overwriting" and (out / "run.json").read_bytes() == (old / "run.json").read_bytes():
        flags = ("--overwrite",)
    finish(start(kind, folder, out, *flags))


def results(out: Path) -> tuple[bytes, list[dict]]:
    """What a run leaves, without clocks: the final adapter's bytes and metrics.jsonl, or the samples."""
    if (out / "samples.jsonl").exists():
        return (out / "samples.jsonl").read_bytes(), []
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    rows = [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]
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
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), {}
        with gzip.open(ROOT / "data/society/test.jsonl.gz", "rt") as lines:
            rows = list(itertools.islice(map(json.loads, lines), 60))
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        for file, some in (("rows.jsonl", rows), ("completions.jsonl", texts)):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in some))
        old = folder / "old" / "run"
        finish(start("train_dpl.py", folder, old, "--alpha", "0.5"))
        for number, (kind, (_, script, _)) in enumerate(KINDS.items()):
            kills = (args.kills + len(KINDS) - 1 - number) // len(KINDS)
            if not kills:
                continue
            if script not in whole:
                whole[script], began = folder / "undisturbed" / script, time.monotonic()
                finish(start(script, folder, whole[script]))
                seconds = time.monotonic() - began
            print(f"{kind}: {kills} kills", flush=True)
            out = folder / kind / "run"  # beside it, a reference cache of its own
            for line in hurt(
                kind, folder, out, old, kills, (1.5 if script != "sample.py" else 1) * seconds, draw
            ):
                print(line, flush=True)
            exact = results(out) == results(whole[script])
            if not exact and (KINDS[kind][0] != TWO or distance(out, whole[script]) > 1e-5):
                sys.exit(f"{kind}: the killed run ended elsewhere")
            print(f"  ended {'as the undisturbed run' if exact else 'within 1e-5 of it'}", flush=True)


if __name__ == "__main__":
    main()
