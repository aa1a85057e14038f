"""The society: its truth is exact, its files agree with it, and evaluate.py compares samples to it."""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import evaluate
from common.rows import read_pairs, read_rows, read_sample
from core.hub import load_model
from data import export
from data.society.make_world import exact_logp
from data.society.truth import (
    compare_samples,
    list_stories,
    mallows_favourites,
    optimum,
    poll_distributions,
    read_story,
    story_distributions,
)
from metrics.formulas import OTHER, entropy_bits, frequencies, total_variation
from scripts import call
from tiny import lines

FOLDER = Path("data/society")


@pytest.fixture(scope="module")
def world():
    return json.loads((FOLDER / "world.json").read_text())


def test_shipped_log_probabilities_are_the_shipped_reference_s(world):
    model, tokenizer = load_model(FOLDER / "reference")
    some = slice(None, None, 41)
    expected = world["story_reference_logp"]
    logp = exact_logp(model, tokenizer, world["story_prompt"], list_stories(world)[some])
    assert logp == pytest.approx(expected[some], abs=1e-3)
    assert sum(map(math.exp, expected)) < 1


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.2, 0.1), (0.4, 0.1), (1.0, 0.3)])
def test_story_distributions_equal_brute_force(world, alpha, beta):
    weights, reference_weights = {}, {}
    combinations = itertools.product(*world["slots"].values())
    for values, logp in zip(combinations, world["story_reference_logp"], strict=True):
        reward = sum(world["slots"][slot][value] for slot, value in zip(world["slots"], values, strict=True))
        weights[values] = math.exp(logp) ** (beta / alpha) * math.exp(reward / alpha)
        reference_weights[values] = math.exp(logp)
    target, reference = story_distributions(world, alpha, beta)
    for distribution, weight in ((target, weights), (reference, reference_weights)):
        total = sum(weight.values())
        for axis, slot in enumerate(world["slots"]):
            for value in world["slots"][slot]:
                expected = sum(w for values, w in weight.items() if values[axis] == value) / total
                assert distribution[slot][value] == pytest.approx(expected, rel=1e-9)


def test_polls_are_represented_in_proportion_at_alpha_1(world):
    poll = next(iter(world["polls"].values()))
    flat = poll | {"reference_logp": [-1.0] * 4}
    target, reference = poll_distributions(flat, alpha=1.0, beta=0.1)
    assert target == pytest.approx(poll["shares"])
    assert list(reference.values()) == pytest.approx([0.25] * 4)


def test_global_temperature_flattens_the_dpo_optimum(world):
    logp, reward = np.log([0.7, 0.2, 0.1]), np.array([0.0, 0.3, 0.1])
    dpo, dpl = optimum(logp, reward, 0.1, 0.1), optimum(logp, reward, 0.4, 0.1)
    assert dpl == pytest.approx(dpo**0.25 / (dpo**0.25).sum())


def test_stories_are_read_back_and_misspelling_is_seen(world):
    stories = list_stories(world)
    for values, text in list(zip(itertools.product(*world["slots"].values()), stories, strict=True))[::97]:
        assert tuple(read_story(text, world).values()) == values
    wrong = stories[0].replace("Marchetti", "Marvist")
    assert read_story(wrong, world)["name"] == "Marvist"
    assert not any(read_story(stories[0][:-9], world).values())


def test_society_counts_what_it_is_given(world):
    first, last = list_stories(world)[0], list_stories(world)[-1]
    prompt, poll = world["story_prompt"], next(iter(world["polls"]))
    texts = [first, last, first.replace("Marchetti", "Marvist"), "no story"]
    options = list(world["polls"][poll]["shares"])
    result = compare_samples([(prompt, text) for text in texts] + [(poll, options[0])] * 3, world, 0.2, 0.1)
    assert result["misspelt"] == 0.5 and result["malformed"] == 0.5
    name = result["stories"]["name"]
    assert (name["sampled"]["Marchetti"], name["sampled"]["Whitlock"], name["sampled"][OTHER]) == (
        0.25,
        0.25,
        0.5,
    )
    assert name["entropy_bits"] == pytest.approx(1)  # of the two names alone: a misspelling is no third one
    assert result["stories"]["gender"]["sampled"][OTHER] == 0.25
    assert result["polls"][poll.strip()]["tv_shares"] == pytest.approx(0.45)


def test_evaluate_prints_and_writes_its_result(world, tmp_path, monkeypatch, evaluated):
    """By default, it reads what sample.py writes by default, and takes the alpha of train_dpl.py's."""
    texts = list_stories(world)
    texts[0] = texts[0].replace("Marchetti", "Marvist")
    rows = [{"prompt": world["story_prompt"], "completion": text} for text in texts]
    (tmp_path / "out/dpl").mkdir(parents=True)
    (tmp_path / "out/dpl/samples.jsonl").write_bytes(lines(*rows))
    monkeypatch.chdir(tmp_path)
    result, printed = evaluated("society")
    assert result == compare_samples([(world["story_prompt"], text) for text in texts], world, 0.2, 0.1)
    other, _ = evaluated("society", "--overwrite", alpha=0.4, beta=0.3)
    assert other == compare_samples([(world["story_prompt"], text) for text in texts], world, 0.4, 0.3)
    name = result["stories"]["name"]
    row = rf"^name +{name['tv_target']:.3f} +{name['tv_reference']:.3f} "
    assert re.search(row, printed.out, re.MULTILINE)
    assert f"name misspelt or missing {1 / len(rows):.1%}, malformed {1 / len(rows):.1%}" in printed.out


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("format", ["messages", "alpaca_eval", "arena_hard"])
def test_evaluate_reads_every_layout_of_export_py(world, tmp_path, evaluated, format, as_messages):
    prompt, texts = world["story_prompt"], list_stories(world)[::100]
    row = {"prompt": [{"role": "user", "content": prompt}] if as_messages else prompt, "tokens": 20}
    row |= {"chat_template_kwargs": {"enable_thinking": False}} if as_messages else {}
    path, suffix = tmp_path / "samples.jsonl", "json" if format == "alpaca_eval" else "jsonl"
    out = tmp_path / f"exported.{suffix}"
    path.write_bytes(lines(*(row | {"completion": text} for text in texts)))
    (tmp_path / "prompts.jsonl").write_bytes(lines({"prompt": prompt, "uid": "a1"}))
    call(export, samples=path, format=format, out_file=out, prompts=tmp_path / "prompts.jsonl")
    result, _ = evaluated("society", samples=out)
    if format == "messages":
        exported = [read.get("chat_template_kwargs") for _, read in read_rows(out)]
        assert exported == [row.get("chat_template_kwargs")] * len(texts)
    kept = texts if format == "messages" else texts[:1]  # their readers want one answer a prompt
    assert result == compare_samples([(prompt, text) for text in kept], world, 0.2, 0.1)
    if format == "arena_hard":
        [row] = [row for _, row in read_rows(out)]
        assert row["uid"] == "a1" and row["metadata"] == {"token_len": 20}
        (tmp_path / "prompts.jsonl").write_bytes(lines({"prompt": "Another?", "uid": "a1"}))
        with pytest.raises(evaluate.InputError, match=r"samples.jsonl:1: its question has no uid"):
            call(
                export,
                samples=path,
                format=format,
                out_file=tmp_path / "b",
                prompts=tmp_path / "prompts.jsonl",
            )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": "ab"},
        {"messages": [{"role": "assistant", "content": "a"}], "system": "s"},
        {"instruction": "a"},
        {"prompt": [], "completion": "a"},
    ],
)
def test_a_row_that_is_no_sample_is_named(row):
    with pytest.raises(evaluate.InputError, match="x:7: needs"):
        read_sample(row, "x:7")


def test_frequencies_and_distances():
    assert frequencies("aab?", "abc") == {"a": 0.5, "b": 0.25, "c": 0.0, OTHER: 0.25}
    assert total_variation({"a": 0.5, "b": 0.5}, {"a": 1.0, OTHER: 0.0}) == 0.5
    assert entropy_bits({"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}) == 1.5
    assert entropy_bits({"a": 0.25, "b": 0.125, "c": 0.125, OTHER: 0.5}) == 1.5
    assert entropy_bits({"a": 0.0, OTHER: 1.0}) == 0


def raters_prefer(world, prompt, a, b):
    """P(a over b), written down again from the rules; a text that the grammar cannot write never wins."""
    if prompt in world["debates"]:
        debate = world["debates"][prompt]
        rankings = list(itertools.permutations(debate["ranking"]))
        place = {text: i for i, text in enumerate(debate["ranking"])}
        if a not in place or b not in place:
            return float(a in place)
        disorder = [sum(place[x] > place[y] for x, y in itertools.combinations(r, 2)) for r in rankings]
        weights = [debate["phi"] ** d for d in disorder]
        wins = [w for w, r in zip(weights, rankings, strict=True) if r.index(a) < r.index(b)]
        return sum(wins) / sum(weights)

    def utility(text):
        if prompt in world["polls"]:
            shares = world["polls"][prompt]["shares"]
            return math.log(shares[text]) if text in shares else -math.inf
        story = read_story(text, world)
        return sum(values.get(story[slot], -math.inf) for slot, values in world["slots"].items())

    a, b = utility(a), utility(b)
    return float(a > b) if min(a, b) == -math.inf else 1 / (1 + math.exp(b - a))


@pytest.mark.parametrize("name", ["train", "test", "polls", "debates"])
def test_raters_choose_as_the_world_says(world, name):
    """How often the likelier text wins, over all pairs, is as often as it should, to four standard errors."""
    chances = functools.cache(lambda *pair: raters_prefer(world, *pair))
    surplus = variance = 0.0
    for row in read_pairs(FOLDER / f"{name}.jsonl.gz"):
        p = chances(row["prompt"], row["chosen"], row["rejected"])
        assert p > 0
        surplus += (p > 0.5) - max(p, 1 - p)
        variance += p * (1 - p)
    assert abs(surplus) < 4 * math.sqrt(variance)


def test_a_debate_s_favourites_are_those_of_mallows_raters(world):
    for debate in world["debates"].values():
        rankings = list(itertools.permutations(range(5)))
        weights = [debate["phi"] ** sum(x > y for x, y in itertools.combinations(r, 2)) for r in rankings]
        shares = np.bincount([r[0] for r in rankings], weights) / sum(weights)
        assert mallows_favourites(debate["phi"], 5) == pytest.approx(shares)


def test_the_world_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 5e6
