"""A run's folder: opening it, checkpoints that survive a crash at any moment, and the result.

    run.json, metrics.jsonl                       flags and run_id; a row of numbers every few steps
    checkpoint/000100/state-0-of-2.safetensors    what process 0 holds: trained weights and optimizer state
                      state-1-of-2.safetensors    under FSDP the next rows; otherwise one file holds all
                      state.json                  step, run_id, digests of model, data and each file
    adapter_model.safetensors ...                 at the end

The flags and the step number determine the position in the data, the learning rate and the random seeds, so
a checkpoint stores none of these. It is written under a hidden name, flushed to disk and then renamed. Its
digests cover every byte, so damage is noticed. Any number of processes can resume from it. Its run_id says
which run wrote it: --overwrite may be killed before it has removed the checkpoints of the run before.
"""

import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.files import (
    TOKENIZER_FILES,
    InputError,
    atomic_write,
    digest_file,
    digest_json,
    is_writable,
    lock,
    parse_json,
    require_file,
    write_json,
    write_tensors,
)
from common.flags import require_same
from common.parallel import all_gather, barrier, get_rank, get_world_size, to_local

# flags that may change when a run is resumed (model and data: the path may, the content may not)
MAY_CHANGE = {"out_dir", "overwrite", "resume", "model", "data", "eval_data", "max_steps", "epochs"}
MAY_CHANGE |= {"log_every", "eval_every", "save_every", "keep", "wandb", "tensorboard"}
MAY_CHANGE |= {"parallel", "checkpoint_activations", "micro_batch_tokens", "compile", "attention"}
MAY_CHANGE |= {"sample_batch_size", "log_samples"}
LOGS = {".log", ".txt", ".out", ".err"}  # files that a user may write into the folder before the run


def open_run(config: Any) -> Path:
    """Check everything that can be checked before loading a model; returns the run's folder, untouched.

    Raises InputError if the data is missing, if the folder holds something that must be kept, or if the run
    to resume had other flags.
    """
    for name in ("model", "data"):
        if getattr(config, name) is None:
            raise InputError(f"--{name}: is missing; give both --model and --data")
    for path in filter(None, (config.data, config.eval_data)):
        require_file(path)
    out = Path(config.out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out}: is a file")
    if not is_writable(out):
        raise InputError(f"--out_dir {out}: cannot write there")
    check_folder(config, out)
    return out


def check_folder(config: Any, out: Path) -> None:
    """Raise InputError if the folder holds something to keep, or the run to resume has other flags."""
    # hidden files are what a killed process was writing
    files = [path for path in out.glob("*") if path.name[0] != "." and path.suffix not in LOGS]
    if not any(path.name != "reference_cache" for path in files):
        return
    if not (out / "run.json").is_file():
        raise InputError(f"--out_dir {out}: holds files that are no run; name another folder")
    # a run that failed before its first row has nothing to lose
    files = [*out.glob("checkpoint/*"), *out.glob("*.safetensors"), *out.glob("metrics.jsonl")]
    started = any(path.stat().st_size for path in files)
    if started and not (config.overwrite or config.resume):
        raise InputError(f"--out_dir {out}: holds a run; --resume continues it, --overwrite replaces it")
    if config.resume:
        require_same(asdict(config), flags_to_resume(out, type(config)), MAY_CHANGE)


def claim_run(config: Any, out: Path) -> None:
    """Lock the run's folder for this run until distributed() ends. All processes must call it.

    Raises InputError if another run has the lock, or has written there since open_run(). If not all processes
    see the same folder, it raises InputError under FSDP, which could save no checkpoint, and warns under DDP.
    """
    if get_rank() == 0:
        lock(out / ".lock")
        check_folder(config, out)
    barrier()
    seen = all_gather((out / ".lock").read_text() if (out / ".lock").is_file() else "")
    if len(set(seen)) > 1:
        reason = f"--out_dir {out}: must be a folder that all nodes share"
        if config.parallel == "fsdp":
            raise InputError(reason)
        if get_rank() == 0:
            print(f"warning: {reason}, to --resume on all of them", file=sys.stderr)


def read_run(out: Path) -> dict[str, Any]:
    """run.json: a run's flags, the name of their class and its run_id. Raises InputError if it is damaged."""
    try:
        return {**parse_json((out / "run.json").read_bytes())}
    except (ValueError, TypeError):
        raise InputError(f"{out / 'run.json'}: damaged; --overwrite starts the run anew") from None


def run_id(out: Path) -> str | None:
    """Which run a folder holds; None if it has no run.json, or one from before there were ids."""
    return read_run(out).get("run_id") if (out / "run.json").is_file() else None


def flags_to_resume(out: Path, config: type) -> dict[str, Any]:
    """The flags of the run in a folder. Raises InputError if a class other than `config` has them."""
    flags = read_run(out)
    began, mine = flags.get("config"), config.__name__  # older runs do not name it
    if began not in (None, mine):
        raise InputError(f"--out_dir {out}: was begun with {began}, not {mine}: --resume it with that script")
    return {name: value for name, value in flags.items() if name not in ("run_id", "config")}


def saved_args(out: Path, config: type) -> list[str]:
    """The flags of the run in a folder, as a command line would give them; warns of those not in `config`."""
    flags = flags_to_resume(out, config) | {"out_dir": str(out), "overwrite": False}
    for name in flags.keys() - {one.name for one in fields(config)}:
        print(f"warning: {out / 'run.json'}: --{name} {flags.pop(name)} is no flag any more", file=sys.stderr)
    values = {name: v if isinstance(v, list) else [v] for name, v in flags.items() if v is not None}
    return [word for name, value in values.items() for word in (f"--{name}", *map(str, value))]


def metrics_before(out: Path, start: int) -> list[bytes]:
    """The lines of metrics.jsonl before step `start`. Raises InputError if the file is damaged."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if start and path.is_file() else []
    try:
        complete = [line for line in lines if line.endswith(b"\n")]  # a killed run may leave half a line
        return [line for line in complete if parse_json(line)["step"] < start]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; move it away to --resume without the old rows") from None


class Plan(NamedTuple):
    """Which steps a run makes, and from where."""

    count: int  # examples
    size: int  # examples of a step
    start: int  # first step
    steps: int  # of the whole run
    checkpoint: tuple[Path, dict[str, Any]] | None  # to go on from
    metrics: list[bytes]  # rows of metrics.jsonl from before


def plan_run(config: Any, out: Path, digests: dict[str, str], count: int) -> Plan:
    """Claim the run's folder and find out where to start. `count` is the number of examples."""
    claim_run(config, out)
    checkpoint = find_checkpoint(config, digests)
    start = checkpoint[1]["step"] if checkpoint else 0
    size = min(config.batch_size, count)
    steps = config.max_steps or math.ceil(config.epochs * count / size)
    if start > steps:
        raise InputError(f"--max_steps, --epochs: {steps:,} steps, but the run to --resume is at {start:,}")
    return Plan(count, size, start, steps, checkpoint, metrics_before(out, start))


def old_files(out: Path) -> set[Path]:
    """What --overwrite removes from a run's folder; checkpoint/ itself stays, as it may be a link."""
    patterns = ["adapter_*", "*.safetensors*", "*config.json", "README.md", "dispersion.*", "samples.jsonl*"]
    patterns += [*TOKENIZER_FILES, "*.jinja", "samples/*", "tensorboard/*", "checkpoint/*"]
    return {path for pattern in patterns for path in out.glob(pattern)}


def start_run(config: Any, out: Path, plan: Plan) -> None:
    """Write run.json and metrics.jsonl, and remove a run that is overwritten. All processes must call it."""
    if get_rank() == 0:
        _start_run(config, out, plan.metrics)
    barrier()  # no process writes into the folder before it holds run.json


def _start_run(config: Any, out: Path, metrics: list[bytes]) -> None:
    saved = read_run(out) if config.resume and (out / "run.json").is_file() else {"run_id": uuid.uuid4().hex}
    # overwrite is true until the old run is gone: if this process is killed before, --resume removes the rest
    overwrite = config.overwrite or saved.get("overwrite", False)
    flags = asdict(config) | {"run_id": saved.get("run_id"), "config": type(config).__name__}
    write_json(out / "run.json", flags | {"overwrite": overwrite})  # first: a folder with it can be resumed
    if overwrite:
        for path in old_files(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(out / "run.json", flags | {"overwrite": False})
    with atomic_write(out / "metrics.jsonl", "wb") as file:
        file.writelines(metrics)


def save_checkpoint(
    folder: Path,
    step: int,
    digests: dict[str, str],
    model: nn.Module,
    optimizer: Optimizer,
    keep: int,
) -> None:
    """Write the checkpoint of `step` into `folder`; delete later steps and all but the newest `keep`.

    `digests` are those of model and data, by the name of their flag, which find_checkpoint() compares. All
    processes must call it.
    """
    new = folder / f".{step:06d}"
    if get_rank() == 0:
        for unfinished in folder.glob(".*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    parts = get_world_size() if any(isinstance(p, DTensor) for p in model.parameters()) else 1
    written = {}
    if get_rank() < parts:
        name = f"state-{get_rank()}-of-{parts}.safetensors"
        tensors = {key: to_local(tensor) for key, tensor in _state(model, optimizer)}
        written[name] = write_tensors(new / name, tensors)
    files = {name: sha256 for part in all_gather(written) for name, sha256 in part.items()}
    if get_rank() == 0:
        state = {"step": step, "run_id": run_id(folder.parent), "files": files, **digests}
        write_json(new / "state.json", {**state, "sha256": digest_json(state)})
        path = folder / new.name[1:]
        shutil.rmtree(path, ignore_errors=True)  # only a damaged one can be there
        os.replace(new, path)
        _flush_folder(folder)
        kept = [path for path in checkpoints(folder) if int(path.name) <= step][-keep:]
        for path in set(checkpoints(folder)) - set(kept):
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((p for p in folder.glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of the run, and its state.json; None if there is none.

    Warns of damaged ones. Raises InputError if all are damaged. All processes must call it: they share the
    reading.
    """
    names, warnings = [path.name for path in checkpoints(folder)], []
    if any(other != names for other in all_gather(names)):
        raise InputError(f"{folder}: differs between processes: it must be a folder that all nodes share")
    run = run_id(folder.parent)
    for path in reversed(checkpoints(folder)):
        state, damage = _verify(path)
        damages = [damage for damage in all_gather(damage) if damage]
        if not damages and state.get("run_id") != run:
            continue  # of a run that is being overwritten
        if not damages:
            for warning in warnings if get_rank() == 0 else ():
                print(f"warning: {warning}; going on from {path.name}", file=sys.stderr)
            return path, state
        warnings.append(f"{path}: damaged: {damages[0]}")
    if warnings:
        raise InputError(f"{warnings[0]}; no undamaged checkpoint is left: --overwrite restarts the run")
    return None


def find_checkpoint(config: Any, digests: dict[str, str]) -> tuple[Path, dict[str, Any]] | None:
    """newest_checkpoint() of the run to resume; None if there is none.

    Raises InputError if the run had another model, reward model or other data, or if all are damaged.
    """
    newest = newest_checkpoint(Path(config.out_dir) / "checkpoint") if config.resume else None
    for name in digests if newest else ():
        if newest[1].get(name, digests[name]) != digests[name]:
            raise InputError(f"--{name} {getattr(config, name)}: not that of the run to --resume")
    return newest


def load_checkpoint(path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Restore trained weights and optimizer state from an undamaged checkpoint, each process its own part."""
    parts = len(state["files"])
    files = [safe_open(path / f"state-{part}-of-{parts}.safetensors", "pt") for part in range(parts)]
    keys = set(files[0].keys())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        _fill_rows(p.detach(), files, name)
        for key in (key for key in keys if key.startswith(f"{name}|")):
            if files[0].get_slice(key).get_shape():
                value = torch.zeros_like(p)
                _fill_rows(value, files, key)
            else:  # the optimizer's count of steps
                value = files[0].get_tensor(key).to(p.device)  # fused AdamW counts on the GPU
            optimizer.state[p][key.removeprefix(f"{name}|")] = value


def _state(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield name, p.detach()
            for key, value in optimizer.state.get(p, {}).items():
                yield f"{name}|{key}", value


def _fill_rows(tensor: Tensor, files: list[Any], key: str) -> None:
    """Copy a stored tensor's rows into `tensor`, or into the shard of it that this process holds.

    FSDP splits rows into equal parts, rounded up: the last ones may be short or empty.
    """
    first, last = 0, len(tensor)
    if isinstance(tensor, DTensor):
        size = -(-last // get_world_size())
        first, last = min(get_rank() * size, last), min((get_rank() + 1) * size, last)
    start, parts = 0, []
    for file in files:
        part = file.get_slice(key)
        stop = start + part.get_shape()[0]
        if first < stop and start < last:
            parts.append(part[max(first - start, 0) : min(last, stop) - start])
        start = stop
    if parts:
        to_local(tensor).copy_(torch.cat(parts))


def _verify(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state.json, and what is damaged in it or in this process's share of the files."""
    try:
        state = parse_json((path / "state.json").read_bytes())
        parts = len(state["files"])
        names = {f"state-{part}-of-{parts}.safetensors" for part in range(parts)}
        is_whole = state["step"] == int(path.name) and names and names == set(state["files"])
        if state.pop("sha256") != digest_json(state) or not is_whole or not {"model", "data"} <= set(state):
            return {}, "state.json was changed"
        for name in sorted(state["files"])[get_rank() :: get_world_size()]:
            if digest_file(path / name) != state["files"][name]:
                return {}, f"{name} was cut short or changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, " ".join(str(error).split())
    return state, ""


def _flush_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
