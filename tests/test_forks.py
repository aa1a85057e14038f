"""A new loss is a script of at most 25 lines that touches no other file; a wrong one is refused."""

import pytest
import torch
import torch.nn.functional as F

from common.files import ROOT, InputError
from core.hub import load_model
from core.lora import add_lora
from core.model import pair_stats
from core.pairs import load_pairs, pack
from core.trainer import train
from scripts import rows_of, run_script
from tiny import PAIRS, lines, plain_stats
from train_dpl import DPLConfig, dpl_loss

FORKS = ROOT / "tests" / "forks"
ROWS = [*PAIRS, {"prompt": "Who sings?", "chosen": " My friend.", "rejected": " Zoë sings about a café!"}]


def run_fork(name, folder, **flags):
    """Run a fork for two steps as a user would; returns its rows of metrics.jsonl."""
    flags = {"out_dir": folder / "run", "max_steps": 2, "warmup_steps": 0} | flags
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    codes, _, stderr = run_script(1, f"tests/forks/{name}.py", *words)
    assert codes == [0], stderr
    return rows_of(folder / "run")


def run_loss(name, model, folder, **flags):
    """run_fork on four pairs."""
    (folder / "pairs.jsonl").write_bytes(lines(*ROWS))
    flags |= {"model": model, "data": folder / "pairs.jsonl", "batch_size": 4, "log_every": 1}
    return run_fork(name, folder, **flags, lora_dropout=0, lr=1e-2)


def stats_of_start(folder, path):
    """pair_stats of the four pairs under the untrained model."""
    model, tokenizer = load_model(folder)
    return pair_stats(model, pack(load_pairs(str(path), tokenizer, 512)), entropy=True)


@pytest.mark.parametrize("path", sorted(FORKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_fork_is_at_most_25_lines(path):
    assert len(path.read_text().splitlines()) <= 25


def test_a_reward_of_one_s_own(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"{n} + 1 =", "answer": f"#### {n + 1}"} for n in range(4)]
    (tmp_path / "problems.jsonl").write_bytes(lines(*rows))
    flags = {"model": tiny_model_folder, "data": tmp_path / "problems.jsonl", "max_steps": 1}
    [first, *_] = run_fork("gsm8k_reward", tmp_path, **flags, num_samples=2, max_new_tokens=4)
    assert first["reward"] == 0  # a random model solves nothing


def test_readme_shows_a_fork_that_is_tested():
    assert (FORKS / "simpo.py").read_text() in (ROOT / "README.md").read_text()


def test_a_loss_without_a_reference_trains(tiny_model_folder, tmp_path):
    first, second, last = run_loss("simpo", tiny_model_folder, tmp_path)
    stats = stats_of_start(tiny_model_folder, tmp_path / "pairs.jsonl")
    reward = 2.0 * stats.logp / stats.length
    expected = F.softplus(0.5 - reward[:, 0] + reward[:, 1]).mean().item()
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert last["loss"] < second["loss"] < first["loss"]
    assert {"logp_chosen", "logp_rejected", "reward_margin", "reward_accuracy"} < set(first)
    assert "kl" not in first and not (tmp_path / "reference_cache").exists()


def test_an_added_term_is_logged_by_its_name(tiny_model_folder, tmp_path):
    first, _, last = run_loss("dpl_with_sft", tiny_model_folder, tmp_path, sft_weight=0.5)
    stats = stats_of_start(tiny_model_folder, tmp_path / "pairs.jsonl")
    sft = (-stats.logp[:, 0] / stats.length[:, 0]).mean().item()
    assert first["sft"] == pytest.approx(sft, rel=1e-5)
    expected = dpl_loss(stats, stats, 0.2, 0.1).mean().item() + 0.5 * sft
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert last["sft"] < first["sft"]


def test_an_entropy_bonus_has_its_gradient(tiny_model_folder, tmp_path):
    [first, *_] = run_loss("entropy_bonus", tiny_model_folder, tmp_path, bonus=3.0)
    stats = stats_of_start(tiny_model_folder, tmp_path / "pairs.jsonl")
    assert first["policy_entropy"] == pytest.approx(stats.entropy.mean().item(), rel=1e-5)
    torch.manual_seed(0)
    model, tokenizer = load_model(tiny_model_folder)
    pairs = load_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 512)
    add_lora(model, 16, 16)
    # the gradient by autograd alone, from transformers' own logits, text by text
    logp, entropy = plain_stats(model, pairs)
    margin = 0.1 * ((logp - stats.logp.detach()) @ torch.tensor([1.0, -1.0]))
    loss = (F.softplus(-margin) - 3.0 * entropy.mean(-1)).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm().item()
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-3)


BAD = {
    "a mean": (lambda p, r: {"loss": dpl_loss(p, r, 0.1, 0.1).mean()}, r'"loss" must have shape \(pairs,\)'),
    "a mean beside the loss": (
        lambda p, r: {"loss": dpl_loss(p, r, 0.1, 0.1), "extra": p.logp.mean()},
        r'"extra" must have shape \(pairs,\)',
    ),
    "two columns": (lambda p, r: {"loss": p.logp}, r'"loss" must have shape \(pairs,\)'),
    "a number": (
        lambda p, r: {"loss": dpl_loss(p, r, 0.1, 0.1), "beta": 0.1},
        r'"beta" must have shape \(pairs,\), one value per pair, not float',
    ),
    "a tensor": (lambda p, r: dpl_loss(p, r, 0.1, 0.1), 'a dict with the key "loss"'),
    "no loss": (lambda p, r: {"losses": dpl_loss(p, r, 0.1, 0.1)}, 'a dict with the key "loss"'),
    "no gradient": (lambda p, r: {"loss": dpl_loss(r, r, 0.1, 0.2)}, "it has no gradient"),
    "a batch statistic": (
        lambda p, r: {"loss": dpl_loss(p, r, 0.1, 0.1) - p.logp.mean()},
        '"loss" of a pair depends on the other pairs of its micro-batch',
    ),
    "a squeeze": (
        lambda p, r: {"loss": dpl_loss(p, r, 0.1, 0.1).squeeze()},
        '"loss" of a pair depends on the other pairs of its micro-batch',
    ),
}


@pytest.mark.parametrize(("objective", "message"), BAD.values(), ids=BAD)
def test_a_loss_that_would_train_wrong_in_silence_is_refused(tiny_model_folder, tmp_path, objective, message):
    (tmp_path / "pairs.jsonl").write_bytes(lines(*ROWS))
    config = DPLConfig(model=str(tiny_model_folder), data=str(tmp_path / "pairs.jsonl"))
    config.out_dir = str(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        train(config, objective)
    assert not (tmp_path / "run" / "checkpoint").exists()
