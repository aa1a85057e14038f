"""Many processes: the same losses and the same weights for any number, DDP or FSDP2, also across a resume."""

import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from common.files import ROOT
from common.rows import read_rows
from core.hub import load_model
from core.pairs import count_tokens, micro_batches
from scripts import (
    SOCIETY,
    be_one_of_many,
    free_port,
    rows_of,
    run_dpl,
    run_script,
    start_processes,
    torchrun,
)
from tiny import first_pairs, lines
from train_dpl import DPLConfig

STEPS = 6
KINDS = {
    "lora": {"lora_rank": 8, "lora_alpha": 8.0, "lora_dropout": 0.0, "lr": 1e-3},
    "full": {"lora_rank": 0, "lr": 1e-4},
}


def work(rank, world, port, configs):
    """Train every config in turn, as process `rank` of `world`."""
    be_one_of_many(rank, world, port)
    for config in configs:
        run_dpl(replace(config))  # with torchrun's environment: --parallel fsdp is checked here


def run_many(world, configs):
    """Train every config in turn on `world` processes, which start once."""
    port = free_port()
    processes = start_processes(work, [(rank, world, port, configs) for rank in range(world)])
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * world


def losses(config):
    return [row["loss"] for row in rows_of(config.out_dir)]


def weights(config):
    name = "adapter_model" if config.lora_rank else "model"
    return load_file(f"{config.out_dir}/{name}.safetensors")


def same(found, wanted):
    """Losses of every step, final weights and exported files of two runs agree."""
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-5)
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    files = [{path.name for path in Path(config.out_dir).glob("*")} for config in (found, wanted)]
    assert files[0] == files[1]
    for name in {"config.json", "adapter_config.json"} & files[0]:
        ours, theirs = (json.loads(Path(c.out_dir, name).read_text()) for c in (found, wanted))
        assert ours == theirs


@pytest.fixture
def runs(tmp_path):
    """(name, parallel, processes) -> the config of a finished run.

    "half" ones of two processes stopped at half way, and those of four went on from there; "lean" ones
    recompute activations.
    """
    folder = tmp_path / "runs"
    folder.mkdir()
    rows = [row for _, row in read_rows(ROOT / "data/society/test.jsonl.gz")]
    (folder / "rows.jsonl").write_bytes(lines(*rows[::50]))  # stories and polls: long pairs and short ones
    model, tokenizer = load_model(SOCIETY)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    model.half().save_pretrained(folder / "model")  # its head is tied
    tokenizer.save_pretrained(folder / "model")

    def config(name, parallel, world, **flags):
        """Of a kind, the word in its name."""
        defaults = {"max_steps": STEPS, "schedule": "constant", "log_every": 1, "eval_every": STEPS}
        defaults |= {"batch_size": 9, "micro_batch_tokens": 120, "save_every": 6, "warmup_steps": 3}
        defaults |= {"data": str(folder / "rows.jsonl"), "eval_data": str(folder / "rows.jsonl")}
        defaults |= {"model": str(folder / "model"), "out_dir": str(folder / f"{world}/{name}-{parallel}")}
        config = DPLConfig(**(defaults | KINDS[name.split()[-1]] | flags))
        config.parallel = parallel  # after the check for torchrun, which is not here yet
        return config

    made = {(kind, "ddp", 1): config(kind, "ddp", 1) for kind in KINDS}
    for one in made.values():
        run_dpl(one)
    kinds = list(product(KINDS, ("ddp", "fsdp")))
    some = {(kind, parallel, 2): config(kind, parallel, 2) for kind, parallel in kinds}
    some |= {(f"half {k}", p, 2): config(f"half {k}", p, 2, max_steps=STEPS // 2) for k, p in kinds}
    some["lean full", "fsdp", 2] = config("lean full", "fsdp", 2, checkpoint_activations=True)
    run_many(2, list(some.values()))
    made |= some
    some = {}
    for kind, parallel in kinds:
        place = folder / "resumed on 4" / f"{kind}-{parallel}"
        some[f"half {kind}", parallel, 4] = copied(made[f"half {kind}", parallel, 2], place)
    run_many(4, list(some.values()))
    return made | some


def copied(half, folder):
    """The config that resumes a copy of a run stopped at half way."""
    shutil.copytree(half.out_dir, folder)
    resumed = replace(half, parallel="ddp", out_dir=str(folder), resume=True, max_steps=STEPS)
    resumed.parallel = half.parallel
    return resumed


def test_any_number_of_processes_trains_the_same_and_resumes_another_s_checkpoint(runs, tmp_path):
    for (name, parallel, world), config in runs.items():
        print(f"{name}, {parallel}, {world} processes")
        kind = name.split()[-1]
        if name.startswith("half") and world == 2:
            files = {path.name for path in Path(config.out_dir).glob("checkpoint/*/*")}
            shards = [f"state-{i}-of-2" for i in (0, 1)] if parallel == "fsdp" else ["state-0-of-1"]
            assert files == {"state.json", *(f"{shard}.safetensors" for shard in shards)}
            config = replace(copied(config, tmp_path / f"{kind}-{parallel}"), parallel="ddp")
            run_dpl(config)
        same(config, runs[kind, "ddp", 1])


@given(st.lists(st.integers(1, 50), min_size=4, max_size=40), st.integers(1, 150), st.integers(1, 4))
def test_processes_share_every_row_once_in_as_many_groups_of_near_equal_load(lengths, budget, world):
    examples = [([0], [0] * length, [0] * length) for length in lengths]
    shares = [micro_batches(range(len(examples)), examples, budget, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1 and all(group for share in shares for group in share)
    rows = [[row for group in share for row in group] for share in shares]
    assert sorted(row for some in rows for row in some) == list(range(len(examples)))
    loads = [sum(count_tokens(examples[row]) for row in some) for some in rows]
    assert max(loads) - min(loads) <= max(map(count_tokens, examples))
    over = [g for s in shares for g in s if len(g) > 1 and sum(count_tokens(examples[r]) for r in g) > budget]
    assert len(over) < world and all(len(group) == 2 for group in over)


def test_bad_input_ends_all_processes_in_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    # the file is good, but there is no writing below it: only rank 0 finds out
    data, out = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl" / "run"
    model = ROOT / SOCIETY
    done = torchrun("train_dpl.py", "--model", model, "--data", data, "--out_dir", out)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "rows.jsonl" in errors[0]
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_nodes_that_share_no_folder_are_told_so(tmp_path, parallel):
    """Two processes in folders of their own, and a relative --out_dir: FSDP fails to save, DDP to resume."""
    data, society = first_pairs("test", 16, tmp_path / "rows.jsonl"), ROOT / SOCIETY
    flags = {"data": data, "model": society, "out_dir": "run", "max_steps": 2, "parallel": parallel}
    words = ["train_dpl.py", *(f"--{name}={value}" for name, value in flags.items())]
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    codes, _, stderr = run_script(2, *words, folders=folders)
    if parallel == "ddp":
        assert codes == [0, 0] and stderr.count("must be a folder that all nodes share") == 1
        codes, _, stderr = run_script(2, *words, "--resume", folders=folders)
    assert 2 in codes
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "must be a folder that all nodes share" in errors[0]


def test_fsdp_holds_half_of_the_weights_on_each_of_two_processes():
    _, stdout, _ = run_script(2, "bench/fsdp_memory.py")
    shares = [float(share) for share in re.findall(r"([\d.]+)%", stdout)]
    assert len(shares) == 4 and max(shares) <= 60 and sum(shares) >= 200
