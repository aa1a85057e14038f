"""The loop against ten lines of plain PyTorch, what it prints, the flags it starts with, its model card."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_dpl
from common.files import InputError
from core import trainer
from core.hub import load_model, model_card
from core.model import pair_stats
from core.pairs import batch_indices, load_pairs, pack
from core.trainer import parse_run
from scripts import SOCIETY, call, read_lines, run_dpl, society_config
from tiny import PAIRS, lines
from train_dpl import DPLConfig, dpl_loss


@pytest.fixture
def config(tmp_path):
    """Six steps of eight pairs, all weights, on forty pairs of the society."""
    flags = {"batch_size": 8, "max_steps": 6, "warmup_steps": 2, "lr": 1e-4, "log_every": 1, "lora_rank": 0}
    return society_config(tmp_path, 40, **flags)


OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0),
    "rmsprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_run_is_ten_lines_of_plain_pytorch(config, name, max_grad_norm):
    config = replace(config, optimizer=name, max_grad_norm=max_grad_norm, schedule="linear")
    rows = run_dpl(config)
    model, tokenizer = load_model(SOCIETY)
    pairs = load_pairs(config.data, tokenizer, 512)
    with torch.no_grad():
        reference = pair_stats(model, pack(pairs))
    optimizer, norms = OPTIMIZERS[name](model.parameters()), []
    for step in range(6):
        batch = batch_indices(step, 8, 40, config.seed)
        known = reference._replace(logp=reference.logp[batch])
        dpl_loss(pair_stats(model, pack([pairs[i] for i in batch])), known, 0.2, 0.1).mean().backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        if max_grad_norm and norms[-1] > max_grad_norm:
            for p in model.parameters():
                p.grad *= max_grad_norm / norms[-1]
        optimizer.param_groups[0]["lr"] = 1e-4 * [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4][step]
        optimizer.step()
        optimizer.zero_grad()
    assert [row["grad_norm"] for row in rows[:-1]] == pytest.approx(norms, rel=1e-3)
    assert min(norms) > 0.5  # so that clipping at 0.5 does something at every step
    written = load_file(f"{config.out_dir}/model.safetensors")
    moved = load_model(SOCIETY)[0].state_dict()
    for key, weight in model.state_dict().items():
        if key in written:  # the tied head is written once
            change = (weight - moved[key]).norm()
            assert (written[key] - weight).norm() <= 0.01 * change, key  # Adam divides rounding by rounding


def test_batches_are_shuffled_by_the_seed_and_anew_every_epoch():
    epochs = [batch_indices(step, 100, 100, 0) for step in range(3)]
    assert all(sorted(epoch) == list(range(100)) and epoch != sorted(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(0, 100, 100, 1) != epochs[0]
    # no order is left: neighbours of the file are as far apart as any two rows, 33 on average
    place = {row: i for i, row in enumerate(epochs[0])}
    apart = sum(abs(place[i] - place[i + 1]) for i in range(99)) / 99
    assert 25 < apart < 42


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 5), (1.5, 8), (0.1, 1)])
def test_epochs_become_steps(config, epochs, steps):
    rows = run_dpl(replace(config, max_steps=0, epochs=epochs))
    assert rows[-1]["step"] == steps  # 40 rows in batches of 8


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_trains_nearly_as_float32_does(tiny_model_folder, tmp_path, lora_rank):
    (tmp_path / "pairs.jsonl").write_bytes(lines(*PAIRS))
    config = DPLConfig(model=str(tiny_model_folder), data=str(tmp_path / "pairs.jsonl"), lora_rank=lora_rank)
    config = replace(config, max_steps=2, warmup_steps=0, log_every=1, lr=1e-3, lora_dropout=0.0)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        rows = run_dpl(replace(config, dtype=dtype, out_dir=str(tmp_path / dtype)))
        losses[dtype] = [row["loss"] for row in rows]
        name = "adapter_model" if lora_rank else "model"
        weights = load_file(tmp_path / dtype / f"{name}.safetensors").values()
        assert all(weight.dtype == torch.float32 for weight in weights)  # trained weights stay in float32
    # a log-probability of about -50 rounds by 0.1 in bfloat16, and the loss by a tenth of that
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["bfloat16"] != losses["float32"]


def test_a_line_is_printed_every_log_every_steps_without_a_terminal(config, capsys):
    run_dpl(replace(config, eval_data=config.data, eval_every=3, log_every=2))
    printed = capsys.readouterr().out.splitlines()
    steps = [line for line in printed if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step {i}/6" for i in (0, 2, 3, 4, 6)]
    for word in ("loss ", "accuracy ", "margin ", "examples/s", "min left"):
        assert all(word in line for line in steps[:-1])
    assert ["held-out: loss" in line for line in steps] == [True, False, True, False, True]
    assert "before any update" in steps[0] and not any("before any update" in line for line in steps[1:])


def test_the_first_pair_is_shown_with_its_boundaries(config, capsys):
    run_dpl(replace(config, max_steps=1))
    printed = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(printed) if "first example" in line)
    row = read_lines(config.data)[0]
    shown = [line.split(None, 1) for line in printed[first + 1 : first + 4]]
    assert [name for name, _ in shown] == ["prompt", "chosen", "rejected"]
    assert [json.loads(text) for _, text in shown] == [
        row["prompt"], row["chosen"] + "</s>", row["rejected"] + "</s>",
    ]  # fmt: skip


def test_a_run_that_ends_inside_its_warm_up_warns(config, capsys):
    run_dpl(replace(config, max_steps=3, warmup_steps=20))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: --warmup_steps 20: 3 steps end inside the warm-up: --lr 0.0001 ")
    assert f"only {1e-4 * 3 / 20:.2g}" in warning
    run_dpl(replace(config, overwrite=True))
    assert "warning" not in capsys.readouterr().err


# ---- the flags that a run starts with


def start(*words, **flags):
    """The config that train_dpl.py reads from a command line."""
    with patch.object(train_dpl, "main", lambda: parse_run(DPLConfig, "")):
        return call(train_dpl, *words, **flags)


def test_without_model_and_data_the_society_s_flags_are_read():
    config = start(alpha=0.3)
    assert (config.model, config.data) == (SOCIETY, "data/society/train.jsonl.gz")
    assert (config.lr, config.batch_size, config.alpha) == (4e-3, 256, 0.3)
    assert start(lr=1e-3).lr == 1e-3  # the command line has the last word


def test_a_model_and_data_of_one_s_own_get_the_paper_s_defaults():
    config = start(model="mine", data="mine.jsonl")
    paper = (1e-5, 16, 16.0, 0.05, 8, 150, 512)  # appendix B.3
    names = ("lr", "lora_rank", "lora_alpha", "lora_dropout", "batch_size", "warmup_steps", "max_length")
    assert tuple(getattr(config, name) for name in names) == paper


def test_resume_takes_the_run_s_own_flags(config):
    names = ("model", "data", "out_dir", "batch_size", "max_steps", "warmup_steps", "lr", "log_every")
    flags = {"lora_targets": ["q_proj", "v_proj"], "seed": 3, "save_every": 2, "length_normalize": True}
    first = start(**{name: getattr(config, name) for name in names}, **flags)
    run_dpl(first)
    resumed = start("--resume", out_dir=first.out_dir, log_every=2)
    assert resumed == replace(first, resume=True, log_every=2)
    run_dpl(resumed)


def test_what_can_be_checked_is_checked_before_a_model_is_loaded(
    refused, config, finished_run, monkeypatch, tmp_path
):
    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(trainer, "load_policy", never)
    good = ["--model", SOCIETY, "--data", config.data]
    refused(train_dpl, [*good, "--data", "no.jsonl", "--out_dir", tmp_path / "a"], "no.jsonl: no such file")
    refused(train_dpl, [*good, "--eval_data", "no.jsonl", "--out_dir", tmp_path / "a"], "no.jsonl: no such")
    resume = ["--resume", "--out_dir", finished_run, "--lr", "0.5"]
    refused(train_dpl, resume, "--lr 0.5: the run to --resume had 1e-05")


def test_a_log_file_in_the_run_s_folder_is_no_obstacle(config, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("train.log", "nohup.out"):
        (tmp_path / "run" / name).write_text("step 0")
    run_dpl(replace(config, max_steps=1))
    assert (tmp_path / "run" / "train.log").read_text() == "step 0"


def test_a_run_that_failed_before_its_first_row_may_be_started_again(config, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_dpl(config, prepare=lambda *_: 1 / 0)
    assert (tmp_path / "run" / "run.json").exists()
    run_dpl(replace(config, max_steps=1))
    with pytest.raises(InputError, match="holds a run"):
        run_dpl(config)


def test_resume_after_a_kill_in_the_middle_of_a_metrics_row(config):
    rows = run_dpl(replace(config, max_steps=2))
    with open(f"{config.out_dir}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run_dpl(replace(config, max_steps=2, resume=True)) == rows


def test_loss_that_is_not_finite_stops_the_run(refused, tiny_model_folder, data, tmp_path):
    flags = ["--model", tiny_model_folder, "--data", data, "--out_dir", tmp_path / "run", "--lr", "1e30"]
    flags += ["--warmup_steps", 0, "--max_steps", 5]
    refused(train_dpl, flags, "step 1: the loss is NaN or infinite on examples [")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


# ---- the model card


def test_the_model_card_says_how_to_repeat_the_run(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", train_dpl)  # the script that was started
    monkeypatch.setattr(sys, "argv", ["train_dpl.py", "--alpha", "0.3", "--out_dir", "out/two words"])
    rows = run_dpl(replace(config, alpha=0.3, max_steps=1, eval_data=config.data))
    text = Path(config.out_dir, "README.md").read_text()
    assert ModelCard(text).data.to_dict() == {"library_name": "transformers"}  # a folder is no hub name
    for line in (
        "# run",
        train_dpl.__doc__.splitlines()[0],
        f"- base model: `{SOCIETY}`",
        f"- data: `{config.data}`",
        "- command: `python train_dpl.py --alpha 0.3 --out_dir 'out/two words'`",
        f"- versions: torch {torch.__version__}, transformers {transformers.__version__}",
        f"    loss {rows[-1]['loss']:.4g}",
        f"    eval_loss {rows[-1]['eval_loss']:.4g}",
        "    --alpha 0.3",
        "    --beta 0.1",
    ):
        assert f"\n{line}\n" in text


def test_the_model_card_tells_the_hub_the_base_and_the_library(config):
    adapter = replace(config, model="HuggingFaceTB/SmolLM2-135M", lora_rank=4)
    metadata = ModelCard(model_card("run", adapter, {"loss": 0.5})).data.to_dict()
    assert metadata == {"base_model": "HuggingFaceTB/SmolLM2-135M", "library_name": "peft"}
