"""The dispersion, whole runs of train_mallows.py, and its flags."""

import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_mallows
from core.hub import load_model
from core.model import pair_stats
from core.pairs import load_pairs, pack
from core.reference import reference_stats
from scripts import SOCIETY, train
from tiny import lines, some_stats
from train_mallows import (
    LOSSES,
    MallowsConfig,
    log_link,
    mallows_dpl_loss,
    neg_log_dispersion,
    objective,
    report_dispersion,
)

# ---- the dispersion


@torch.no_grad()
def test_dispersion_is_the_released_trainers(tiny_model_folder):
    # there: entropies averaged over the completion's positions and over log V, then over the pair, minus log
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.get_output_embeddings().weight.data *= 40  # entropies well below log V
    vocab_size = model.config.vocab_size
    pairs = [([1, 20, 30], [40, 50, 60, 2], [70, 2]), ([1, 99], [98, 2], [97, 96, 95, 94, 93, 2])]
    expected = []
    for prompt, *completions in pairs:
        shares = []
        for completion in completions:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            shares.append(entropy.mean() / math.log(vocab_size))
        expected.append(-torch.log(sum(shares) / 2))
    found = neg_log_dispersion(pair_stats(model, pack(pairs), entropy=True).entropy, vocab_size)
    assert found.min() > 0.1
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_dispersion_is_positive_and_finite_at_both_ends():
    V = 50_000
    found = neg_log_dispersion(torch.tensor([[0.0, 0.0], [math.log(V), math.log(V) + 1e-4]]), V)
    assert found.isfinite().all() and (found > 0).all()
    assert found[0] > 10 and found[1] < 1e-5


class Words:
    """A tokenizer's decode alone: token i is the word w<i>."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"w{i}" for i in ids)


def test_report_ranks_prompts_by_the_mean_over_their_pairs(tmp_path, capsys):
    examples = [([i % 30], [1], [2]) for i in range(60)]
    c = torch.tensor([i % 30 + (0.25 if i < 30 else -0.25) for i in range(60)], dtype=torch.float64)
    report_dispersion(c, 0.7, examples, Words(), tmp_path)
    found = json.loads((tmp_path / "dispersion.json").read_text())
    assert found["scale"] == 0.7 and found["pairs"] == 60
    assert found["mean"] == pytest.approx(14.5)
    assert found["sd"] == pytest.approx(math.sqrt((30**2 - 1) / 12 + 0.25**2))
    assert found["quantiles"]["0"] == -0.25 and found["quantiles"]["1"] == 29.25
    assert [row["prompt"] for row in found["most_dispersed"]] == [f"w{i}" for i in range(10)]
    assert [row["prompt"] for row in found["least_dispersed"]] == [f"w{i}" for i in range(29, 19, -1)]
    assert [row["c"] for row in found["most_dispersed"]] == pytest.approx(range(10))
    printed = capsys.readouterr().out
    assert "  0.000  w0\n" in printed and "  29.000  w29\n" in printed
    assert (tmp_path / "dispersion.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report_dispersion(torch.ones(1), 1.0, [([1], [2], [3])], Words(), tmp_path)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["dispersion.json"]


# ---- whole runs


@pytest.fixture
def run(tmp_path):
    """A function that trains on a few pairs; returns the rows of metrics.jsonl, and dispersion.json."""
    fruits = ["fig", "grey cat", "warm bread", "café", "friend"]
    for name, nouns in (("train", fruits), ("held_out", fruits[::-1][:3])):
        rows = [
            {"prompt": f"Best {x}?", "chosen": f" The {x}.", "rejected": " Mud, does not want" + "!" * n}
            for n, x in enumerate(nouns)
        ]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    files = {"data": tmp_path / "train.jsonl", "eval_data": tmp_path / "held_out.jsonl"}

    def run(**flags):
        flags = {"model": SOCIETY, "out_dir": tmp_path / "run", "lora_rank": 2, "max_steps": 2} | flags
        rows = train(train_mallows, **files, **flags, log_every=1)
        path = tmp_path / "run/dispersion.json"
        return rows, json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_writes_an_adapter_its_metrics_and_the_dispersion(run, tmp_path, loss):
    rows, found = run(loss=loss)
    assert len(rows) == 3 and rows[0]["grad_norm"] > 0
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert found["mean"] == pytest.approx(1, abs=1e-12)
    assert found["most_dispersed"][0]["prompt"].startswith("Best ")
    assert (tmp_path / "run/dispersion.png").stat().st_size > 1000


def test_scale_is_fitted_to_the_training_pairs_and_held_out_pairs_get_the_same(run, tmp_path):
    [first, *_], dispersion = run(loss="dpl", alpha=0.4)
    model, tokenizer = load_model(SOCIETY)
    raw, stats = {}, {}
    for name in ("train", "held_out"):
        pairs = load_pairs(str(tmp_path / f"{name}.jsonl"), tokenizer, 512)
        stats[name] = reference_stats(model, pairs, tmp_path, 512)
        raw[name] = neg_log_dispersion(stats[name].entropy, model.config.vocab_size)
    scale = 1 / raw["train"].mean()
    assert dispersion["scale"] == pytest.approx(scale.item(), rel=1e-6)
    known = stats["held_out"]  # at step 0 the policy is the reference
    expected = mallows_dpl_loss(known, known, scale * raw["held_out"], 0.4, 0.1).mean().item()
    assert first["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_finds_the_same_dispersion(run):
    assert run()[1] == run(resume=True, max_steps=3)[1]


def test_scale_can_be_fixed_and_the_dispersion_switched_off(run):
    assert run(dispersion_scale=0.25)[1]["scale"] == 0.25
    assert run(dispersion="off", overwrite=True)[1] is None


# ---- the flags


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("dispersion", ["on", "off"])
@pytest.mark.parametrize("loss", LOSSES)
def test_objective_does_what_its_flags_say(loss, dispersion, length_normalize):
    flags = {"loss": loss, "dispersion": dispersion, "length_normalize": length_normalize}
    epsilon = "auto" if length_normalize else 3.0
    phi = {"link": "polynomial", "epsilon": str(epsilon)}
    own = {"phi": phi, "dpl": {"alpha": 0.3}, "simpo": {"gamma": 0.7}}
    config = MallowsConfig(**flags, **own.get(loss, {}), beta=0.2)
    policy, reference = some_stats(5)
    values = objective(policy, reference, config=config, scale=1.5, vocab_size=20)
    for i in range(5):  # in plain numbers, pair by pair
        entropy = reference.entropy[i].tolist()
        c = -1.5 * math.log(sum(entropy) / (2 * math.log(20))) if dispersion == "on" else 1.0
        averaged = length_normalize or loss == "simpo"
        p, r = (
            [logp / (size if averaged else 1) for logp, size in zip(*pair, strict=True)]
            for pair in (
                (policy.logp[i].tolist(), policy.length[i].tolist()),
                (reference.logp[i].tolist(), reference.length[i].tolist()),
            )
        )
        alpha, beta = 0.3 if loss == "dpl" else 0.2, 0.0 if loss == "simpo" else 0.2
        margin = alpha * (p[0] - p[1]) - beta * (r[0] - r[1])
        if loss == "phi":  # the link is held to brute force in test_mallows_losses.py
            link = log_link(torch.tensor(margin), math.exp(-c), "polynomial", epsilon)
            expected = -link.item()
        elif loss == "ipo":
            expected = (c * margin / 0.2 - 1 / (2 * 0.2)) ** 2
        else:
            expected = math.log1p(math.exp(-c * (margin - (0.7 if loss == "simpo" else 0))))
        assert values["loss"][i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert values["reward_margin"][i].item() == pytest.approx(margin, rel=1e-4, abs=1e-5)
        assert values["neg_log_dispersion"][i].item() == pytest.approx(c, rel=1e-5)
