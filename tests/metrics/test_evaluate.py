"""evaluate.py from files to tables: every number against a direct computation, and bad input in one line."""

import numpy as np
import pytest
import torch
from judge_endpoint import serving
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import evaluate
from common.rows import read_samples, transcript
from core.hub import load_model
from metrics import formulas
from scripts import call, read_lines
from tiny import lines

PROMPTS = ("Best fruit?", "A café?", "My friend likes")
TEXTS = (" The fig.", " A grey cat is the best fruit.", " Every baker sings about a café!", " Mud.")


def sample_rows(prompts, texts, **extra):
    return [{"prompt": p, "completion": f"{t}{p[:n]}"} | extra for p in prompts for n, t in enumerate(texts)]


@pytest.fixture
def files(tmp_path):
    """Samples, of which those that end in a question mark were cut, and a baseline's in another order."""
    rows = sample_rows(PROMPTS, TEXTS, finish="eos")
    rows[1]["finish"] = rows[5]["finish"] = "length"
    (tmp_path / "samples.jsonl").write_bytes(lines(*rows))
    others = sample_rows(reversed(PROMPTS), [TEXTS[0], *TEXTS[:3]])
    (tmp_path / "baseline.jsonl").write_bytes(lines(*others))
    return tmp_path


@pytest.fixture
def run(files, evaluated):
    """A function that runs a subcommand on the files; returns its metrics and what it printed."""

    def run(command, *words, **flags):
        result, printed = evaluated(command, *words, samples=files / "samples.jsonl", **flags)
        return result["metrics"], printed.out

    return run


def groups_of(path):
    """Texts by prompt."""
    groups = {}
    for row in read_lines(path):
        groups.setdefault(row["prompt"], []).append(row["completion"])
    return groups


@torch.no_grad()
def mean_state(folder, text):
    """Mean of the last hidden states of one text, stripped and not padded, in the encoder's own words."""
    ids = AutoTokenizer.from_pretrained(folder)(text.strip(), return_tensors="pt").input_ids
    return AutoModel.from_pretrained(folder).eval()(ids).last_hidden_state[0].mean(0).double().numpy()


def test_diversity_of_embeddings_equals_the_double_sum(files, run, tiny_model_folder):
    result, printed = run("diversity", embedder=tiny_model_folder, baseline=files / "baseline.jsonl")
    means = {}
    for name in ("samples", "baseline"):
        means[name] = {}
        for prompt, texts in groups_of(files / f"{name}.jsonl").items():
            x = np.array([mean_state(tiny_model_folder, text) for text in texts])
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            means[name][prompt] = np.mean([1 - a @ b for a in x for b in x])
    row = result["cosine distance, eq. 44"]
    for name, by_prompt in means.items():
        assert row[name]["mean"] == pytest.approx(np.mean(list(by_prompt.values())), abs=1e-6)
    difference = [means["samples"][p] - means["baseline"][p] for p in PROMPTS]  # by prompt, not by row
    low, high = formulas.bootstrap(np.array(difference), np.mean, 0)
    assert row["difference"]["mean"] == pytest.approx(np.mean(difference), abs=1e-6)
    assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx((low, high), abs=1e-6)
    assert row["samples"]["prompts"] == 3
    apart = result["cosine distance, i != j"]["samples"]["mean"]
    assert apart == pytest.approx(row["samples"]["mean"] * 4 / 3, rel=1e-6)
    assert "12 samples of 3 prompts, 16.7% cut at the length limit" in printed
    assert "an unknown share cut" in printed


def test_lexical_metrics_of_texts_and_at_the_budget(files, run):
    result, _ = run("diversity", budget=2)
    groups = groups_of(files / "samples.jsonl").values()
    expected = np.mean([formulas.distinct_n(texts, 2) for texts in groups])
    assert result["distinct-2"]["samples"]["mean"] == pytest.approx(expected)
    cut = [[" ".join(formulas.words(text)[:2]) for text in texts] for texts in groups]
    expected = np.mean([formulas.distinct_n(texts, 1) for texts in cut])
    assert result["distinct-1, 2 words"]["samples"]["mean"] == pytest.approx(expected)
    assert result["words per text, 2 words"]["samples"]["mean"] == 2
    unigrams = len({word for texts in groups for text in texts for word in formulas.words(text)})
    expected = np.mean([formulas.ead(texts, 1, unigrams) for texts in groups])
    assert result["EAD-1"]["samples"]["mean"] == pytest.approx(expected)


@torch.no_grad()
def plain_rewards(folder, groups):
    """Rewards of strings, one text at a time, by transformers alone."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    return {
        prompt: [model(torch.tensor([encode(prompt) + encode(t) + [2]])).logits.item() for t in texts]
        for prompt, texts in groups.items()
    }


def test_diversity_among_good_samples(files, run, reward_folder):
    baseline = files / "baseline.jsonl"
    result, printed = run("diversity", baseline=baseline, reward_model=reward_folder)
    rewards = {
        n: plain_rewards(reward_folder, groups_of(files / f"{n}.jsonl")) for n in ("samples", "baseline")
    }
    threshold = np.median(np.concatenate(list(rewards["baseline"].values())))
    assert f"reward at least {threshold:.4g}" in printed
    good, others = (
        {
            prompt: [t for t, r in zip(texts, rewards[n][prompt], strict=True) if r >= threshold]
            for prompt, texts in groups_of(files / f"{n}.jsonl").items()
        }
        for n in ("samples", "baseline")
    )
    share = result["share of good samples"]["samples"]["mean"]
    assert share == pytest.approx(sum(map(len, good.values())) / 12)
    good = [texts[: len(others[prompt])] for prompt, texts in good.items()]  # of both, equally many
    expected = [formulas.self_bleu(texts) for texts in good if len(texts) > 1]
    row = result["self-BLEU (high: alike) | good"]["samples"]
    assert row["mean"] == pytest.approx(np.mean(expected)) and row["prompts"] == len(expected)
    result, printed = run("diversity", "--overwrite", reward_model=reward_folder, reward_threshold=1e9)
    assert "self-BLEU (high: alike) | good" not in result  # no prompt has two good samples


@torch.no_grad()
def test_quality_is_mean_reward_and_cross_entropy(files, run, reward_folder, tiny_model_folder):
    result, _ = run("quality", reward_model=reward_folder, reference=tiny_model_folder)
    groups = groups_of(files / "samples.jsonl")
    rewards = plain_rewards(reward_folder, groups)
    assert result["reward"]["samples"]["mean"] == pytest.approx(np.mean([*rewards.values()]), abs=1e-5)
    model, tokenizer = load_model(tiny_model_folder)
    per_text, per_token = [], []
    for number, (prompt, texts) in enumerate(groups.items()):
        nats, tokens = 0.0, 0
        for index, text in enumerate(texts):
            is_cut = (number, index) in ((0, 1), (1, 1))
            start, answer = (tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, text))
            ids = torch.tensor([start + answer + [tokenizer.eos_token_id] * (not is_cut)])
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(start) - 1 :]
            nats, tokens = nats - logp.sum().item(), tokens + len(logp)
        per_text.append(nats / 4)
        per_token.append(nats / tokens)
    assert result["cross-entropy, nats per text"]["samples"]["mean"] == pytest.approx(
        np.mean(per_text), rel=1e-5
    )
    assert result["cross-entropy, nats per token"]["samples"]["mean"] == pytest.approx(
        np.mean(per_token), rel=1e-5
    )


def test_win_rate_by_rewards(files, run, reward_folder):
    result, _ = run("winrate", baseline=files / "baseline.jsonl", reward_model=reward_folder)
    groups = {n: groups_of(files / f"{n}.jsonl") for n in ("samples", "baseline")}
    rewards = {n: plain_rewards(reward_folder, group) for n, group in groups.items()}
    score, longer = [], []  # longer: of each prompt
    for prompt in PROMPTS:
        longer.append([])
        for i in range(4):
            ours, theirs = ((groups[n][prompt][i], rewards[n][prompt][i]) for n in ("samples", "baseline"))
            is_tie = abs(ours[1] - theirs[1]) < 1e-6
            score.append(0.5 if is_tie else float(ours[1] > theirs[1]))
            if not is_tie and len(ours[0]) != len(theirs[0]):
                longer[-1].append((ours[1] > theirs[1]) == (len(ours[0]) > len(theirs[0])))
    assert 0.5 in score and len({*score}) > 1
    assert result["win rate"]["samples"]["mean"] == pytest.approx(np.mean(score))
    assert result["ties"]["samples"]["mean"] == pytest.approx(score.count(0.5) / 12)
    expected = np.mean([np.mean(wins) for wins in longer if wins])
    assert result["longer text wins, if one wins"]["samples"]["mean"] == pytest.approx(expected) != 0.5
    assert result["verdict missing"]["samples"]["mean"] == 0


# ---- judges


def answer(question):
    """Rates a pool by its number of different responses, and prefers the answer with more letters e."""
    if "<response 1>" in question:
        pool = [part.partition("</response")[0] for part in question.split("<response ")[1:]]
        return f"Rating: {len({text.partition('>')[2].strip() for text in pool})}"
    if "Mud" in question:
        return "I cannot say."
    a, b = (question.partition(f"[{x}]")[2].partition(f"[/{x}]")[0].count("e") for x in "AB")
    return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"


@pytest.fixture
def endpoint(files, monkeypatch):
    """Flags of an endpoint on this machine, and its server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    prompts = files / "prompts"
    prompts.mkdir()
    for name in ("logical", "content", "surface_form", "perspective"):
        (prompts / f"{name}.txt").write_text(f"Rate the {name}.\n{{prompt}}\n{{responses}}")
    (prompts / "pairwise.txt").write_text("{prompt}\n[A]{answer_a}[/A]\n[B]{answer_b}[/B]")
    flags = {"cache": files / "cache.jsonl", "judge_prompts": prompts, "judge_model": "m"}
    with serving() as server:
        server.answer = answer
        yield flags | {"endpoint": server.url}, server


def test_judged_diversity(files, run, endpoint):
    flags, server = endpoint
    result, printed = run("judge", **flags, baseline=files / "baseline.jsonl")
    assert result["content"]["samples"]["mean"] == 4
    assert result["logical"]["samples"]["mean"] == 3  # 5 - 2: in every pool of two, two different texts
    assert "content: 0 of 3 ratings missing" in printed
    baseline = np.mean([len({*texts}) for texts in groups_of(files / "baseline.jsonl").values()])
    assert result["perspective"]["baseline"]["mean"] == pytest.approx(baseline)
    sent = len(server.log)
    with pytest.raises(evaluate.InputError, match="--overwrite"):
        run("judge", **flags)
    run("judge", "--overwrite", **flags)
    assert len(server.log) == sent  # all answers were in the cache


def test_dry_run_asks_nothing(files, endpoint, capsys):
    flags, server = endpoint
    (files / "other.jsonl").write_bytes(lines(*sample_rows(PROMPTS, [t + "!" for t in TEXTS])))
    flags |= {"samples": files / "samples.jsonl", "out_file": files / "out.json", "dry_run": True}
    for command, count in (("judge", 6 + 3 * 3), ("winrate", 24)):
        more = {"baseline": files / "other.jsonl"} if command == "winrate" else {}
        call(evaluate, command, **flags, **more)
        assert f"{count} requests would be sent" in capsys.readouterr().out
    assert not server.log and not (files / "out.json").exists()


def test_win_rate_by_a_judge(files, run, endpoint):
    flags, _ = endpoint
    result, _ = run("winrate", **flags, baseline=files / "baseline.jsonl")
    ours, theirs = (groups_of(files / f"{name}.jsonl") for name in ("samples", "baseline"))
    by_prompt, missing = [], 0
    for prompt in PROMPTS:
        scores = []
        for a, b in zip(ours[prompt], theirs[prompt], strict=True):
            if "Mud" in a + b:
                missing += 1
            else:
                scores.append(np.sign(a.count("e") - b.count("e")) / 2 + 0.5)
        by_prompt.append(np.mean(scores))
    assert result["win rate"]["samples"]["mean"] == pytest.approx(np.mean(by_prompt))
    assert result["verdict flips with the order"]["samples"]["mean"] == 0
    assert result["verdict missing"]["samples"]["mean"] == missing / 12 == 0.25


def test_embeddings_from_an_endpoint(files, run, endpoint):
    flags, _ = endpoint
    result, _ = run("diversity", embeddings_url=flags["endpoint"], embedder="m")
    expected = []
    for texts in groups_of(files / "samples.jsonl").values():
        expected.append(formulas.cosine_diversity(np.array([[len(t), t.count("e"), 1.0] for t in texts])))
    assert result["cosine distance, eq. 44"]["samples"]["mean"] == pytest.approx(np.mean(expected))


def test_a_damaged_line_of_a_cache_is_what_a_killed_run_leaves(files, capsys):
    """It is ignored, however deep its brackets are."""
    (files / "cache.jsonl").write_text("[" * 100_000 + "\n")
    flags = {"samples": files / "samples.jsonl", "baseline": files / "samples.jsonl"}
    call(evaluate, "winrate", "--dry_run", **flags, cache=files / "cache.jsonl")
    assert capsys.readouterr().out == "12 requests would be sent\n"


def test_message_prompts_are_grouped_by_the_whole_conversation(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [
        {"prompt": [*start, {"role": "user", "content": "Best fruit?"}], "completion": text}
        for start in ([], turns)
        for text in TEXTS
    ]
    (tmp_path / "samples.jsonl").write_bytes(lines(*rows))
    groups = read_samples(tmp_path / "samples.jsonl")
    assert [len(group) for group in groups.values()] == [4, 4]
    prompts = [transcript(group[0].prompt) for group in groups.values()]
    assert prompts == ["Best fruit?", "user: Hi\n\nassistant: Yes?\n\nuser: Best fruit?"]
