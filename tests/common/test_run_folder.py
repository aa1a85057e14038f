"""A run's folder: overwriting that is killed half-way, two processes at once, volumes, other places."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from common import checkpoint
from common.files import ROOT, InputError, digest_tensors, lock, release_locks
from core import reference, trainer
from core.hub import load_model
from core.reference import reference_stats
from core.trainer import parse_run
from scripts import SOCIETY, call, run_dpl, society_config
from train_dpl import DPLConfig, objective


@pytest.fixture
def config(tmp_path):
    """Three steps of four pairs, in a folder two levels down."""
    flags = {"model": str(ROOT / SOCIETY), "out_dir": str(tmp_path / "runs/run"), "save_every": 1}
    return society_config(tmp_path, 12, **flags, batch_size=4, max_steps=3, warmup_steps=1, lr=4e-3)


def run(config, **options):
    """Train by DPL, and the adapter's bytes."""
    run_dpl(config, **options)
    return (Path(config.out_dir) / "adapter_model.safetensors").read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and no clean-up that matters follows."""


@contextlib.contextmanager
def killed_at(call, monkeypatch):
    """Kill the block at its call number `call` that removes or renames something."""
    calls = iter(range(1000))

    def count(function, *args, **kwargs):
        if next(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for place, name in ((shutil, "rmtree"), (Path, "unlink"), (os, "replace")):
            function = getattr(place, name)
            patch.setattr(place, name, lambda *a, function=function, **k: count(function, *a, **k))
        yield


@pytest.mark.parametrize(("call", "link"), [(0, False), (1, True), (3, False), (5, True), (7, False)])
def test_overwriting_that_was_killed_goes_on_as_the_new_run(config, tmp_path, monkeypatch, call, link):
    """Also where checkpoint/ is a link to another disk: it stays one."""
    new = replace(config, alpha=0.4, out_dir=str(tmp_path / "fresh" / "run"))
    wanted = run(new)
    folder = tmp_path / "runs/run"
    run(config)
    if link:
        (folder / "checkpoint").rename(tmp_path / "disk")
        (folder / "checkpoint").symlink_to(tmp_path / "disk", target_is_directory=True)
    new = replace(new, out_dir=config.out_dir, overwrite=True)
    with killed_at(call, monkeypatch):
        run(new)
    try:
        found = run(replace(new, overwrite=False, resume=True))
    except InputError as error:  # killed before anything was changed: the old run is whole
        assert call == 0 and "--alpha 0.4: the run to --resume had 0.2" in str(error)
        found = run(new)
    assert found == wanted
    assert (folder / "checkpoint").is_symlink() == link
    assert [path.name for path in checkpoint.checkpoints(folder / "checkpoint")] == ["000002", "000003"]


def test_checkpoints_of_before_there_were_ids_still_resume(config):
    wanted = run(replace(config, out_dir=f"{config.out_dir}2"))
    run(replace(config, max_steps=2, epochs=1.0))
    for path in Path(config.out_dir).glob("**/*.json"):
        values = json.loads(path.read_bytes())
        if "run_id" in values:
            del values["run_id"]
            if "sha256" in values:
                del values["sha256"]
                values["sha256"] = checkpoint.digest_json(values)
            path.write_text(json.dumps(values))
    assert run(replace(config, resume=True)) == wanted


def test_a_folder_belongs_to_one_process_at_a_time(config, tmp_path):
    """The lock of another process is respected while it lives, whatever this one was told."""
    code = "import sys; from common.files import lock; lock(sys.argv[1]); print(flush=True); sys.stdin.read()"
    path = Path(config.out_dir) / ".lock"
    command = [sys.executable, "-c", code, str(path)]
    owner = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    owner.stdout.readline()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=f"process {owner.pid} of .* writes there: wait until it ends"):
            trainer.train.__wrapped__(replace(config, **flags), partial(objective, config=config))
    assert list(Path(config.out_dir).iterdir()) == [path]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert run(config) and not path.exists()


def test_a_lock_that_was_released_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Its file was removed between open() and flock(): a lock on it would keep nobody out."""
    from common import files

    path, honest, calls = tmp_path / "lock", files.fcntl.flock, []

    def flock(*args):
        calls.append(args)
        if len(calls) == 1:
            path.unlink()
        honest(*args)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    lock(path)
    assert len(calls) == 2 and path.exists()
    release_locks()
    assert not path.exists()


def test_samples_have_one_writer(monkeypatch, tmp_path):
    out = tmp_path / "samples.jsonl"
    lock(tmp_path / ".samples.jsonl.lock")
    monkeypatch.setattr(sample, "sample_prompts", lambda *_: pytest.fail("samples beside another process"))
    monkeypatch.setattr(sample, "main", sample.main.__wrapped__)  # the lock is this process's own
    with pytest.raises(InputError, match="writes there"):
        call(sample, model=SOCIETY, prompts="data/society/prompts.jsonl", out_file=out)
    release_locks()
    assert not list(tmp_path.iterdir())


def test_a_volume_keeps_the_reference_cache_inside(config, monkeypatch, tmp_path):
    """--out_dir is mounted into a folder where nothing may be written."""
    folder = Path(config.out_dir)
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).resolve().is_relative_to(folder))
    with pytest.raises(Killed):
        run(config, prepare=lambda *_: (_ for _ in ()).throw(Killed))
    (folder / "run.json").unlink()  # as if it had been killed in the reference pass
    (folder / "metrics.jsonl").unlink()
    monkeypatch.setattr(reference, "pair_stats", lambda *_: pytest.fail("computed again"))
    run(replace(config, resume=True))
    assert [path.name for path in folder.parent.iterdir()] == ["run"] and (
        folder / "reference_cache"
    ).is_dir()


def test_the_working_directory_may_be_the_folder(config, monkeypatch):
    Path(config.out_dir).mkdir(parents=True)
    monkeypatch.chdir(config.out_dir)
    here = replace(config, out_dir=".")
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
        patch.setattr(checkpoint, "start_run", lambda *_: 1 / 0)  # after the reference pass
        run(here)
    assert [path.name for path in Path().iterdir()] == ["reference_cache"]
    assert run(replace(here, resume=True))


def test_a_run_below_the_folder_of_its_model_may_be_overwritten(config, tmp_path):
    model = shutil.copytree(ROOT / SOCIETY, tmp_path / "model")
    below = replace(config, model=str(model), out_dir=str(model / "runs/run"))
    assert run(below) == run(replace(below, overwrite=True))


def test_what_can_be_refused_is_refused_before_the_reference_pass(config, monkeypatch):
    run(config)
    monkeypatch.setattr(trainer, "reference_stats", lambda *_: pytest.fail("computed"))
    path, state = checkpoint.newest_checkpoint(Path(config.out_dir) / "checkpoint")
    state = {**state, "model": "another"}
    (path / "state.json").write_text(json.dumps({**state, "sha256": checkpoint.digest_json(state)}))
    resumed = replace(config, resume=True)
    with pytest.raises(InputError, match="not that of the run to --resume"):
        run(resumed)
    shutil.rmtree(path)
    with pytest.raises(InputError, match="--max_steps, --epochs: 1 steps, but the run to --resume is at 2"):
        run(replace(resumed, max_steps=1))
    (Path(config.out_dir) / "metrics.jsonl").write_text("no row\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: damaged"):
        run(resumed)
    with pytest.raises(InputError, match="must return a dict"):
        run(replace(config, overwrite=True), objective=lambda *_: None)


EDITS = {
    "fewer rows": lambda tensors: {name: x[:-1].clone() for name, x in tensors.items()},
    "three columns": lambda tensors: {name: x[:, [0, 1, 0]] for name, x in tensors.items()},
    "another dtype": lambda tensors: {name: x.double() for name, x in tensors.items()},
    "a tensor too few": lambda tensors: {name: x for name, x in tensors.items() if name != "entropy"},
    "a tensor too many": lambda tensors: tensors | {"more": torch.zeros(2)},
    "another model's numbers": lambda tensors: {name: x + 1 for name, x in tensors.items()},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_cache_of_the_right_name_and_the_wrong_content_is_not_used(config, tmp_path, edit):
    model, tokenizer = load_model(SOCIETY)
    pairs = trainer.load_pairs(config.data, tokenizer, 64)
    wanted = reference_stats(model, pairs, tmp_path / "cache", 500, "this model")
    [path] = (tmp_path / "cache").iterdir()
    tensors = edit(load_file(path))
    save_file(tensors, path, {"key": "another model's", "sha256": digest_tensors(tensors)})
    found = reference_stats(model, pairs, tmp_path / "cache", 500, "this model")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_society_is_found_from_any_working_directory(monkeypatch, tmp_path):
    """And by files of flags that name it."""
    monkeypatch.chdir(tmp_path)
    for words in ([f"@{ROOT / 'recipes/society.txt'}", "--max_steps", "1"], []):
        monkeypatch.setattr("sys.argv", ["train_dpl.py", *words])
        config = parse_run(DPLConfig, "")
        assert (config.model, config.data) == (str(ROOT / SOCIETY), str(ROOT / "data/society/train.jsonl.gz"))
