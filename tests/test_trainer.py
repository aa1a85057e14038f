"""The loop: its gradient, its batches, its cache, and that a resumed run is the uninterrupted one."""

import importlib.util
import math
import os
import resource
import signal
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.checkpoint import checkpoints
from common.files import InputError
from common.flags import run_command
from core import reference, trainer
from core.hub import load_model
from core.lora import add_lora, load_lora
from core.model import Stats, pair_stats
from core.pairs import batch_indices, pack
from core.reference import reference_stats
from core.trainer import TrainConfig, forward_backward, learning_rate, load_pairs, train
from scripts import SOCIETY, rows_of, run_dpl, society_config
from train_dpl import DPLConfig, objective


@pytest.fixture(scope="module")
def society():
    """The shipped reference, its tokenizer and 24 test pairs."""
    model, tokenizer = load_model(SOCIETY)
    return model, load_pairs("data/society/test.jsonl.gz", tokenizer, 64)[:24]


@pytest.fixture
def data(tmp_path):
    """Six steps on 40 pairs, with dropout: a resumed run must draw the same."""
    flags = {"eval_data": str(tmp_path / "rows.jsonl"), "batch_size": 8, "max_steps": 6, "warmup_steps": 2}
    flags |= {"log_every": 1, "eval_every": 2, "save_every": 2, "lora_dropout": 0.3}
    return society_config(tmp_path, 40, **flags, lr=4e-3, schedule="cosine")


def test_the_split_into_micro_batches_does_not_change_the_gradient(society):
    _, pairs = society
    model = add_lora(AutoModelForCausalLM.from_pretrained(SOCIETY, dtype=torch.float32), 4, 4.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    reference = Stats(torch.randn(24, 2), torch.ones(24, 2), torch.ones(24, 2))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    wanted_loss = partial(objective, config=DPLConfig(alpha=0.4))

    def gradient(budget):
        model.zero_grad()
        found = forward_backward(model, pairs, range(24), reference, wanted_loss, budget)
        return found["loss"], torch.cat([weight.grad.flatten() for weight in weights])

    # the definition, without the loop: the mean of the losses of all pairs in one forward
    losses = wanted_loss(pair_stats(model, pack(pairs)), reference)["loss"]
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), weights)])
    for budget in (1, 100, 300, 10**6):
        loss, found = gradient(budget)
        assert loss == pytest.approx(losses.mean().item(), abs=1e-6)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 5))
def test_batches_are_slices_of_shuffled_epochs(count, size, seed):
    size = min(size, count)
    steps = 3 * count
    stream = [row for step in range(steps) for row in batch_indices(step, size, count, seed)]
    assert len(stream) == steps * size
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(lr=1.0, warmup_steps=4)
    shape = lambda schedule: [learning_rate(replace(config, schedule=schedule), s, 12) for s in range(12)]  # noqa: E731
    assert shape("constant") == [0.25, 0.5, 0.75] + [1.0] * 9
    assert shape("linear")[4:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert shape("cosine")[4:] == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])


def test_reference_cache_is_used_and_never_a_foreign_or_damaged_one(society, tmp_path, monkeypatch):
    model, pairs = society
    first = reference_stats(model, pairs, tmp_path, 500)
    calls = []
    honest = reference.pair_stats
    monkeypatch.setattr(reference, "pair_stats", lambda *a, **k: calls.append(1) or honest(*a, **k))
    again = reference_stats(model, pairs, tmp_path, 500)
    assert not calls and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    torch.testing.assert_close(reference_stats(model, pairs, tmp_path, 500).logp, first.logp)
    assert calls

    reference_stats(model, pairs[:-1], tmp_path, 500)  # other data, other file
    other = AutoModelForCausalLM.from_pretrained(SOCIETY, dtype=torch.float32)
    next(other.parameters()).data[5, 5] += 1.0
    reference_stats(other, pairs, tmp_path, 500)  # one weight of another model, other file
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_reference_pass_goes_on(society, tmp_path, monkeypatch):
    model, pairs = society
    whole = reference_stats(model, pairs, tmp_path / "whole", 500)
    honest, seen = reference.pair_stats, []

    def dies(model, packed, entropy):
        seen.extend(packed.lengths)
        if len(seen) > 12:
            raise KeyboardInterrupt
        return honest(model, packed, entropy=entropy)

    monkeypatch.setattr(reference, "SAVE_SECONDS", -1)
    monkeypatch.setattr(reference, "EXCHANGE_EVERY", 1)
    monkeypatch.setattr(reference, "pair_stats", dies)
    with pytest.raises(KeyboardInterrupt):
        reference_stats(model, pairs, tmp_path / "cut", 250)
    seen.clear()
    monkeypatch.setattr(
        reference, "pair_stats", lambda m, p, entropy: seen.extend(p.lengths) or honest(m, p, entropy)
    )
    found = reference_stats(model, pairs, tmp_path / "cut", 250)
    assert 0 < len(seen) < len(pairs)
    torch.testing.assert_close(found.logp, whole.logp)


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path, monkeypatch):
    """It dies in the middle of step 4, after the checkpoint of step 4 and some rows."""
    run_dpl(data)
    cut, calls = replace(data, out_dir=str(tmp_path / "cut")), []
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        dies = lambda *a: calls.append(1) or (learning_rate(*a) if len(calls) < 6 else 1 / 0)  # noqa: E731
        patch.setattr(trainer, "learning_rate", dies)
        run_dpl(cut)
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    run_dpl(replace(cut, resume=True))
    same_end(cut, data)
    for name, change in ("dry", {"lora_dropout": 0.0}), ("seed", {"seed": data.seed + 1}):
        other = run_dpl(replace(data, **change, max_steps=2, out_dir=str(tmp_path / name)))
        assert other[1]["loss"] != rows_of(data.out_dir)[1]["loss"]


def test_a_run_writes_metrics_and_an_adapter_that_loads(data, tmp_path):
    rows = run_dpl(data)
    assert [row["step"] for row in rows] == list(range(7))
    first, last = rows[0], rows[-1]
    # at step 0 the policy is the reference: no drift, and a DPL margin of (alpha - beta) times the log-ratio
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["eval_reward_margin"] == pytest.approx(
        (0.2 - 0.1) * (first["eval_logp_chosen"] - first["eval_logp_rejected"]), abs=1e-4
    )
    assert last["eval_loss"] < first["eval_loss"]
    assert "grad_norm" in rows[0] and "grad_norm" not in last  # row s describes the policy after s updates

    model, tokenizer = load_model(data.out_dir)  # base and adapter, merged
    pairs = load_pairs(data.data, tokenizer, data.max_length)
    stats = pair_stats(model, pack(pairs))
    assert stats.logp[:, 0].mean().item() == pytest.approx(last["eval_logp_chosen"], abs=1e-3)
    known = pair_stats(load_model(SOCIETY)[0], pack(pairs)).logp
    assert last["eval_kl"] == pytest.approx((known - stats.logp).mean().item(), abs=1e-3)
    assert abs(last["eval_kl"]) > 0.01
    margin = (0.2 * stats.logp - 0.1 * known) @ torch.tensor([1.0, -1.0])
    assert last["eval_reward_accuracy"] == pytest.approx((margin > 0).float().mean().item())
    adapted = load_lora(load_model(SOCIETY)[0], data.out_dir)
    torch.testing.assert_close(pair_stats(adapted, pack(pairs)).logp, stats.logp, atol=1e-3, rtol=0)


def test_rank_0_trains_all_weights_and_writes_a_transformers_folder(data, tmp_path):
    config = replace(data, lora_rank=0, lr=1e-4)
    rows = run_dpl(config)
    model = AutoModelForCausalLM.from_pretrained(config.out_dir, dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(SOCIETY, dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    tokenizer = load_model(config.out_dir)[1]
    stats = pair_stats(model, pack(load_pairs(config.data, tokenizer, 64)))
    assert stats.logp[:, 0].mean().item() == pytest.approx(rows[-1]["eval_logp_chosen"], abs=1e-3)


def same_end(config, whole):
    """A run's adapter and rows are those of the uninterrupted run, bit for bit."""
    found, wanted = (load_file(f"{c.out_dir}/adapter_model.safetensors") for c in (config, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert rows_of(config.out_dir) == rows_of(whole.out_dir)


def run_until(config, step, act):
    """Train, and call `act` in the forward pass of `step`'s training batch."""

    def acting(policy, reference):
        if len(policy.logp) == config.batch_size and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == step + 1:
                act()
        return objective(policy, reference, config=config)

    calls = []
    run_command(lambda: train(config, acting))


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_saves_and_leaves(data, tmp_path, capsys, number, name):
    run_dpl(data)
    before, cut = signal.getsignal(number), replace(data, out_dir=str(tmp_path / "cut"), save_every=100)
    with pytest.raises(SystemExit) as left:
        run_until(cut, 2, lambda: os.kill(os.getpid(), number))
    assert left.value.code == 128 + number and signal.getsignal(number) == before
    assert f"stopped by {name} at step 3 of 6; --resume goes on" in capsys.readouterr().err
    run_dpl(replace(cut, resume=True))
    same_end(cut, data)


def test_a_full_disk_leaves_the_checkpoint_before(data, tmp_path, capsys):
    run_dpl(data)
    cut, (_, most) = replace(data, out_dir=str(tmp_path / "cut")), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SystemExit) as left:
            run_until(cut, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: [Errno ") and error.count("\n") == 1
    assert [path.name for path in checkpoints(tmp_path / "cut" / "checkpoint")] == ["000002"]
    run_dpl(replace(cut, resume=True))
    same_end(cut, data)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data, tmp_path, capsys):
    run_dpl(data)
    half = replace(data, out_dir=str(tmp_path / "cut"), keep=3)
    run_dpl(half)
    assert [path.name for path in checkpoints(tmp_path / "cut" / "checkpoint")] == [
        "000002",
        "000004",
        "000006",
    ]
    for name in ("000004", "000006"):
        path = tmp_path / "cut" / "checkpoint" / name / "state-0-of-1.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    run_dpl(replace(half, resume=True))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(line.endswith("changed; going on from 000002") for line in warnings)
    same_end(half, data)


def test_a_run_stopped_before_its_first_step_can_be_resumed(data, tmp_path):
    run_dpl(data)
    cut = replace(data, out_dir=str(tmp_path / "cut"))
    with pytest.raises(ZeroDivisionError):
        train(cut, lambda *_: 1 / 0)
    run_dpl(replace(cut, resume=True))
    same_end(cut, data)


def test_overwriting_leaves_nothing_of_the_run_before(data, tmp_path):
    run_dpl(data)
    old = ("chat_template.jinja", "special_tokens_map.json", "vocab.json", "spiece.model", "dispersion.png")
    for name in old:
        (tmp_path / "run" / name).write_text("another run's")
    new = replace(data, overwrite=True, lora_rank=0, lr=1e-4)
    run_dpl(new)
    run_dpl(replace(new, out_dir=str(tmp_path / "new")))
    names, expected = ({path.name for path in (tmp_path / run).iterdir()} for run in ("run", "new"))
    assert names == expected and "model.safetensors" in names


def test_rows_go_to_the_loggers_that_are_asked_for(data, monkeypatch):
    seen = []
    with monkeypatch.context() as patch, pytest.raises(InputError, match="--wandb: needs its package"):
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        replace(data, wandb=True)
    # the tests install neither: two that only take notes
    fake = types.SimpleNamespace(init=lambda **_: None, log=lambda row, step: seen.append(("wandb", step)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = types.SimpleNamespace(add_scalar=lambda *row: seen.append(row), flush=lambda: None)
    board = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    rows = run_dpl(replace(data, wandb=True, tensorboard=True))
    assert [row[1] for row in seen if row[0] == "wandb"] == list(range(7))
    assert [row[1:] for row in seen if row[0] == "loss"] == [(row["loss"], row["step"]) for row in rows]
