"""DPL by reinforcement learning: its estimate against J's exact gradient; runs that end, resume and agree."""

import itertools
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_rl
from common.files import ROOT, InputError
from core.hub import load_model, load_reward_model
from core.lora import add_lora
from core.model import Stats, pair_stats
from core.pairs import pack
from sample import sample_completions
from scripts import read_lines, rows_of, run_script, train
from tiny import CHATML, CONFIGS, PAIRS, USER, lines, make
from train_reward import score_texts
from train_rl import Known, RLConfig, advantages, objective, split_texts

STEPS, TOKENS = 4, 3
TEXTS = torch.tensor(list(itertools.product(range(TOKENS), repeat=STEPS)))


def text_logp(tables):
    """log pi of all 81 texts of 4 tokens; tables[t] holds the logits after each beginning of t tokens."""
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for step, table in enumerate(tables):
        beginning = (TEXTS[:, :step] * TOKENS ** torch.arange(step)).sum(1)
        total = total + table.log_softmax(-1)[beginning, TEXTS[:, step]]
    return total


def random_world(seed=0):
    """Tables of a policy, and log pi_ref and r of each text."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    tables, reference = ([draw(TOKENS**t, TOKENS) for t in range(STEPS)] for _ in range(2))
    return [table.requires_grad_() for table in tables], text_logp(reference), draw(len(TEXTS))


def exact_gradient(tables, ref, reward, alpha, beta):
    logp = text_logp(tables)
    j = (logp.exp() * (reward - alpha * logp + beta * ref)).sum()
    return torch.autograd.grad(j, tables)


def mean_estimate(tables, ref, reward, alpha, beta, k):
    """Minus the loss's gradient, averaged over all K-tuples of texts by their probability."""
    logp = text_logp(tables)
    tuples = torch.cartesian_prod(*[torch.arange(len(TEXTS))] * k)
    returns = (reward - alpha * logp.detach() + beta * ref)[tuples]
    stats = Stats(logp[tuples], torch.full(tuples.shape, STEPS))
    loss = objective(stats, Known(ref[tuples], advantages(returns)))["loss"]
    weight = logp.detach()[tuples].sum(1).exp()
    return [-x for x in torch.autograd.grad((weight * loss).sum(), tables)]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.1), (0.2, 0.2), (0.1, 0.0)])
def test_the_mean_of_the_estimate_is_the_gradient(k, alpha, beta):
    tables, ref, reward = random_world()
    exact = exact_gradient(tables, ref, reward, alpha, beta)
    if alpha == beta:  # RLHF: reward minus the KL penalty
        logp = text_logp(tables)
        kl = (logp.exp() * (logp - ref)).sum()
        rlhf = torch.autograd.grad((logp.exp() * reward).sum() - beta * kl, tables)
        for ours, theirs in zip(exact, rlhf):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for ours, theirs in zip(mean_estimate(tables, ref, reward, alpha, beta, k), exact):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_the_gradient_is_zero_at_the_optimum():
    _, ref, reward = random_world()
    p = (0.5 * ref + reward / 0.2).softmax(0).view([TOKENS] * STEPS)  # pi_ref^(beta/alpha) exp(r/alpha)
    tables = []
    for step in range(STEPS):  # conditional probabilities of the next token after each beginning
        table = p.flatten(step + 1).sum(-1).log() if step + 1 < STEPS else p.log()
        order = [*reversed(range(step)), step]  # text_logp: the first token is the lowest digit
        tables.append(table.permute(order).reshape(-1, TOKENS).clone().requires_grad_())
    torch.testing.assert_close(text_logp(tables).exp().view(p.shape), p, atol=1e-12, rtol=0)
    for gradient in mean_estimate(tables, ref, reward, 0.2, 0.1, 2):
        assert gradient.abs().max() < 1e-12


def test_completions_packed_behind_one_prompt_equal_one_by_one():
    model = make(CONFIGS["llama"])
    add_lora(model, 4, 8.0)
    prompt, ends = [5, 6, 7, 8], list(range(0, 97, 9))
    [drawn] = sample_completions(model, [prompt], [[0, 1]], 5, 9, ends, 128)
    assert len({len(c.tokens) for c in drawn}) > 1
    packed = pair_stats(model, pack([(prompt, *(c.tokens for c in drawn))])).logp[0]
    alone = [pair_stats(model, pack([(prompt, c.tokens)])).logp.item() for c in drawn]
    assert packed.tolist() == pytest.approx(alone, abs=1e-4)
    assert packed.tolist() == pytest.approx([c.logp for c in drawn], abs=1e-4)
    cut = [c for c in drawn if c.finish == "length"]
    assert all(c.tokens[-1] not in ends and len(c.tokens) == 9 for c in cut)
    _, again = sample_completions(model, [[9, 9], prompt], [[0, 0], [0, 1]], 5, 9, ends, 128)
    assert [c.tokens for c in again] == [c.tokens for c in drawn]  # whatever else is sampled


def test_a_prompts_texts_are_split_into_rows_of_equally_many():
    prompts, texts = [[1, 2, 3], [4]], [[n] * (2 + n % 3) for n in range(12)]
    for max_tokens, parts in ((15, 1), (14, 2), (8, 3), (1, 6)):
        rows = split_texts(prompts, texts, max_tokens)
        assert len(rows) == 2 * parts and [ids for row in rows for ids in row[1:]] == texts
        assert [row[0] for row in rows] == [prompts[0]] * parts + [prompts[1]] * parts


FLAGS = {"lora_rank": 4, "batch_size": 2, "num_samples": 3, "max_new_tokens": 8, "lr": 1e-2, "max_steps": 4}
FLAGS |= {"warmup_steps": 0, "log_every": 1, "save_every": 2, "log_samples": 2}


@pytest.fixture
def run(tiny_model_folder, tmp_path, monkeypatch):
    """A function that trains on a rule: the share of the letter e. Returns the rows of metrics.jsonl."""
    rows = [{"prompt": row["prompt"], "best": "e", "options": ["e", "a"]} for row in PAIRS]
    (tmp_path / "prompts.jsonl").write_bytes(lines(*rows))

    def run(out, reward=share_of_best, **flags):
        main = lambda: train_rl.train(train_rl.parse_run(RLConfig, None), reward)  # noqa: E731
        monkeypatch.setattr(train_rl, "main", main)
        files = {"model": tiny_model_folder, "data": tmp_path / "prompts.jsonl", "out_dir": tmp_path / out}
        return train(train_rl, **FLAGS | files | flags)

    return run


def share_of_best(rows, texts):
    return [text.count(row["best"]) / (len(text) + 1) for row, text in zip(rows, texts)]


def test_a_stopped_run_goes_on_to_the_bit(run, tmp_path):
    whole = run("whole")
    assert len(whole) == 5 and whole[-1]["entropy"] > 0 and 0 < whole[0]["unique_texts"] <= 1
    run("half", max_steps=2)
    resumed = run("half", max_steps=4, resume=True)
    assert resumed == whole
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    samples = read_lines(tmp_path / "whole/samples/000002.jsonl")
    assert len(samples) == 6 and {"prompt", "completion", "reward", "finish"} == samples[0].keys()


def test_the_loss_gets_the_returns_of_equation_4(run, monkeypatch, tiny_model_folder):
    """Its R is r - alpha log pi + beta log pi_ref, of a policy that has moved."""
    seen, rewards, honest = [], [], train_rl.forward_backward

    def spy(model, rows, indices, known, *more):
        seen.append((pair_stats(model, pack(rows)).logp.detach(), known, rows))
        return honest(model, rows, indices, known, *more)

    monkeypatch.setattr(train_rl, "forward_backward", spy)
    run("spied", lambda *a: rewards.append(share_of_best(*a)) or rewards[-1], alpha=0.3, max_steps=3)
    base, _ = load_model(tiny_model_folder)
    for (logp, known, rows), r in zip(seen, rewards, strict=True):
        ref = pair_stats(base, pack(rows)).logp.detach()
        returns = torch.tensor(r).view(-1, 3) - 0.3 * logp + 0.1 * ref
        torch.testing.assert_close(known.logp, ref, atol=1e-3, rtol=0)
        torch.testing.assert_close(known.advantage, advantages(returns), atol=1e-3, rtol=0)
    assert (logp - ref).abs().max() > 0.01 and known.advantage.abs().max() > 0.01


def test_samples_tell_what_the_template_got(run, tiny_model_folder, tmp_path):
    """So that data/make_pairs.py makes pairs of the prompts that were sampled."""
    model = shutil.copytree(tiny_model_folder, tmp_path / "chat")
    (model / "chat_template.jinja").write_text(CHATML)
    rows = [{"prompt": [USER], "best": "e", "chat_template_kwargs": {"x": 1}}] * 2
    (tmp_path / "prompts.jsonl").write_bytes(lines(*rows))
    run("run", model=model, max_steps=1)
    samples = read_lines(tmp_path / "run/samples/000000.jsonl")
    assert [row["chat_template_kwargs"] for row in samples] == [{"x": 1}] * 6


def test_the_reward_of_a_cut_text(run):
    flags = {"no_reward_if_cut": True, "max_steps": 1, "max_new_tokens": 1}
    cut = run("cut", **flags, reward=lambda rows, texts: [1.0] * len(texts))
    assert cut[0]["reward"] == pytest.approx(1 - cut[0]["share_cut"]) and cut[0]["share_cut"] > 0.5


@pytest.mark.parametrize("value", [[math.nan], ["x"], []])
def test_rewards_that_are_no_numbers_are_refused(run, value):
    with pytest.raises((InputError, ValueError), match=r"reward|could not convert"):
        run("bad", reward=lambda rows, texts: (value * len(texts))[: len(texts)])


@pytest.mark.parametrize(("kind", "parallel"), [(4, "ddp"), (0, "fsdp")])
def test_two_processes_train_the_same(run, tmp_path, tiny_model_folder, kind, parallel):
    """On the society's reward, since a script has no function: its prompts, and a model that answers none."""
    flags = {"model": tiny_model_folder, "data": ROOT / "data/society/prompts.jsonl", "lora_rank": kind}
    words = [f"--{name}={value}" for name, value in (FLAGS | flags).items()]
    found = []
    for world, more in ((1, ()), (2, ("--parallel", parallel))):
        codes, _, stderr = run_script(world, "train_rl.py", *words, *more, "--out_dir", tmp_path / f"{world}")
        assert codes == [0] * world, stderr
        found.append(rows_of(tmp_path / f"{world}"))
    for one, two in zip(*found):
        for name in ("loss", "objective", "entropy", "cross_entropy", "tokens_per_text"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_a_reward_model_rewards(reward_folder):
    model, tokenizer = load_reward_model(str(reward_folder))
    reward = train_rl.load_reward(RLConfig(reward_model=str(reward_folder)))
    rows, texts = [{"prompt": "Best fruit?"}, {"prompt": "A café?"}], [" The fig.", " Mud."]
    expected = score_texts(model.eval(), tokenizer, [row["prompt"] for row in rows], texts)
    assert reward(rows, texts) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match=r"^--reward_model .*: a text has \d+ tokens, and the model \d+ pos"):
        reward(rows[:1], [" The fig." * 10_000])
