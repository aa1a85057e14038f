"""A run's folder: opening it, checkpoints that a crash cannot spoil, and the result.

    run.json, metrics.jsonl                       flags; a row of figures every few steps
    checkpoint/000100/state-0-of-2.safetensors    what process 0 holds: trained weights, optimizer state
                      state-1-of-2.safetensors    under FSDP the next rows; otherwise one file is all
                      state.json                  step, flags, digests of the inputs and of each file
    adapter_model.safetensors ...                 at the end

What a step does depends on (seed, step) alone, so the step's number stands for the data's position, the
schedule and all random numbers. A checkpoint is written under a hidden name, flushed to disk and renamed, and
digests cover every byte: one that has its own name is whole, or found to be damaged. Any number of processes
can go on from it. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from files import InputError, require_same, write_json, write_tensors, write_whole
from lora import save_lora
from parallel import gathered, local, rank, whole, world

# flags that --resume may change (of model and data only the path, not the content)
FREE = {"out_dir", "overwrite", "resume", "max_steps", "epochs", "log_every", "eval_every", "save_every"}
FREE |= {"keep", "parallel", "checkpoint_activations", "micro_batch_tokens", "wandb", "tensorboard"}
FREE |= {"model", "data", "eval_data"}


def open_run(config: Any) -> Path:
    """The run's folder, checked but untouched. Raises InputError if it holds something to keep."""
    out = Path(config.out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out}: is a file")
    # hidden files are what a killed process was writing
    if out.is_dir() and any(path.name[0] != "." for path in out.iterdir()):
        if not (out / "run.json").is_file():
            raise InputError(f"--out_dir {out}: holds files that are no run; name another folder")
        if not (config.overwrite or config.resume):
            raise InputError(f"--out_dir {out}: holds a run; --resume continues it, --overwrite replaces it")
    return out


def start_files(config: Any, out: Path, start: int) -> None:
    """Write run.json; of the folder's old run keep only the rows of metrics.jsonl before step `start`."""
    write_json(out / "run.json", asdict(config))  # first: a folder that has it can be resumed
    if config.overwrite:
        for folder in ("checkpoint", "tensorboard"):
            shutil.rmtree(out / folder, ignore_errors=True)
        old = ("adapter_*", "*.safetensors*", "*config.json", "*.jinja", "dispersion.*")
        for path in {path for pattern in old for path in out.glob(pattern)}:
            path.unlink()
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if start else []
    try:
        rows = [line for line in lines if line.endswith(b"\n")]  # a killed run may leave half a row
        rows = [line for line in rows if json.loads(line)["step"] < start]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; move it away to --resume without the old rows") from None
    with write_whole(path, "wb") as file:
        file.writelines(rows)


def save_checkpoint(
    folder: Path,
    step: int,
    facts: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    keep: int,
) -> None:
    """Write the checkpoint of `step` into `folder`, then keep only the last `keep` up to this step.

    `facts` are what go_back() compares. All processes must call it. Raises InputError if rank 0 cannot see
    a file that another process wrote: nodes without a shared folder.
    """
    new = folder / f".{step:06d}"
    if rank() == 0:
        for unfinished in folder.glob(".*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    gathered(None)
    parts = world() if any(isinstance(p, DTensor) for p in model.parameters()) else 1
    written = {}
    if rank() < parts:
        name = f"state-{rank()}-of-{parts}.safetensors"
        tensors = {key: local(tensor) for key, tensor in _state(model, optimizer)}
        written[name] = write_tensors(new / name, tensors)
    files = {name: sha256 for part in gathered(written) for name, sha256 in part.items()}
    if rank() == 0:
        if missing := [name for name in files if not (new / name).is_file()]:
            raise InputError(f"{new / missing[0]}: not here: --out_dir must be one that all nodes share")
        state = {"step": step, "files": files, **facts}
        write_json(new / "state.json", {**state, "sha256": _digest_json(state)})
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
    """The newest whole checkpoint and its state.json; None if there is none at all. Warns of damaged ones.

    Raises InputError if all are damaged. All processes must call it: they share the reading.
    """
    names, damaged = [path.name for path in checkpoints(folder)], []
    if any(other != names for other in gathered(names)):
        raise InputError(f"{folder}: not the same for all processes: it must be one that all nodes share")
    for path in reversed(checkpoints(folder)):
        state, damage = _verify(path)
        damages = [damage for damage in gathered(damage) if damage]
        if not damages:
            for line in damaged if rank() == 0 else ():
                print(f"warning: {line}; going on from {path.name}", file=sys.stderr)
            return path, state
        damaged.append(f"{path}: damaged: {damages[0]}")
    if damaged:
        raise InputError(f"{damaged[0]}; no other is whole: --overwrite starts the run anew")
    return None


def go_back(config: Any, facts: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> int:
    """Restore the run's newest whole checkpoint and return its step, 0 if there is none.

    Raises InputError if the run had other flags or inputs, or if every checkpoint is damaged.
    """
    found = newest_checkpoint(Path(config.out_dir) / "checkpoint")
    if found is None:
        return 0
    path, state = found
    require_same(facts["config"], state["config"], FREE)
    for name in ("model", "data"):
        if state[name] != facts[name]:
            raise InputError(f"--{name} {getattr(config, name)}: not what the run to --resume was reading")
    load_checkpoint(path, state, model, optimizer)
    return state["step"]


def load_checkpoint(path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Restore trained weights and optimizer state from a whole checkpoint, each process its own part."""
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
                value = files[0].get_tensor(key)
            optimizer.state[p][key.removeprefix(f"{name}|")] = value


def export(out: Path, config: Any, model: PreTrainedModel, tokenizer: Any, row: dict) -> None:
    """Write the adapter (or, at --lora_rank 0, the whole model), the tokenizer and a model card.

    All processes must call it: each weight is put together in turn, for rank 0 to write.
    """
    if config.lora_rank:
        base = Path(config.model)
        save_lora(model, out, base.resolve() if base.is_dir() else config.model)
    else:
        weights, put_together = {}, {}  # a tied weight stays one tensor under two names: it is written once
        for name, weight in model.state_dict(keep_vars=True).items():
            if id(weight) not in put_together:
                tensor = whole(weight.detach())
                put_together[id(weight)] = tensor.cpu() if rank() == 0 else None
            weights[name] = put_together[id(weight)]
        if rank() == 0:
            model.save_pretrained(out / ".weights", state_dict=weights)
            for path in (out / ".weights").iterdir():
                os.replace(path, out / path.name)
            (out / ".weights").rmdir()
    if rank() > 0:
        return
    tokenizer.save_pretrained(out)
    flags = "\n".join(f"    --{name} {value}" for name, value in asdict(config).items())
    results = "\n".join(f"    {name} {value:.4g}" for name, value in row.items())
    with write_whole(out / "README.md") as file:
        file.write(
            f"# {out.name}\n\nTrained from `{config.model}` with\n\n{flags}\n\nended at\n\n{results}\n"
        )
    print(f"wrote {out}")


def _state(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield name, p.detach()
            for key, value in optimizer.state.get(p, {}).items():
                yield f"{name}|{key}", value


def _fill_rows(tensor: Tensor, files: list[Any], key: str) -> None:
    """Copy a stored tensor's rows into a tensor, or into the part of it that this process holds.

    FSDP cuts rows into equal parts, rounded up: the last ones may be short or empty.
    """
    first, last = 0, len(tensor)
    if isinstance(tensor, DTensor):
        size = -(-last // world())
        first, last = min(rank() * size, last), min((rank() + 1) * size, last)
    start, parts = 0, []
    for file in files:
        part = file.get_slice(key)
        stop = start + part.get_shape()[0]
        if first < stop and start < last:
            parts.append(part[max(first - start, 0) : min(last, stop) - start])
        start = stop
    if parts:
        local(tensor).copy_(torch.cat(parts))


def _verify(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state.json, and what is wrong with it or with its share of the files, if any."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        if state.pop("sha256") != _digest_json(state):
            return {}, "state.json was changed"
        for name in sorted(state["files"])[rank() :: world()]:
            if _digest_file(path / name) != state["files"][name]:
                return {}, f"{name} was cut short or changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, " ".join(str(error).split())
    return state, ""


def _digest_json(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            found.update(block)
    return found.hexdigest()


def _flush_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
