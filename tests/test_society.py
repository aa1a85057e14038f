"""The embedded world: its truth is exact, its files are whole, and evaluate.py measures against it."""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from data.society.truth import mallows_favourites, optimum, poll_laws, read_story, story_laws
from evaluate import OTHER, entropy_bits, frequencies, society, total_variation
from model import load_model, pair_stats
from preferences import encode_answers, encode_prompts, pack, read_pairs

FOLDER = Path("data/society")


@pytest.fixture(scope="module")
def world():
    return json.loads((FOLDER / "world.json").read_text())


def stories_of(world):
    values = list(itertools.product(*world["slots"].values()))
    return values, [world["template"].format(**dict(zip(world["slots"], v, strict=True))) for v in values]


def test_shipped_log_probabilities_are_the_shipped_reference_s(world):
    model, tokenizer = load_model(FOLDER / "reference")
    _, stories = stories_of(world)
    some = range(0, len(stories), 41)
    [prompt] = encode_prompts([world["story_prompt"]], tokenizer)
    answers = encode_answers([world["story_prompt"]] * len(some), [stories[i] for i in some], tokenizer)
    with torch.no_grad():
        found = pair_stats(model, pack([(prompt, answer) for answer in answers])).logp[:, 0]
    assert found.tolist() == pytest.approx([world["story_reference_logp"][i] for i in some], abs=1e-3)
    assert sum(map(math.exp, world["story_reference_logp"])) < 1


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.2, 0.1), (0.4, 0.1), (1.0, 0.3)])
def test_story_laws_equal_brute_force(world, alpha, beta):
    values, stories = stories_of(world)
    weights = {}
    for chosen, text, logp in zip(values, stories, world["story_reference_logp"], strict=True):
        reward = sum(world["slots"][slot][value] for slot, value in zip(world["slots"], chosen, strict=True))
        weights[text] = math.exp(logp) ** (beta / alpha) * math.exp(reward / alpha)
    total = sum(weights.values())
    target, reference = story_laws(world, alpha, beta)
    for slot, law in target.items():
        for value, share in law.items():
            wanted = sum(w for text, w in weights.items() if read_story(text, world)[slot] == value) / total
            assert share == pytest.approx(wanted, rel=1e-9)
    assert all(sum(law.values()) == pytest.approx(1) for law in (*target.values(), *reference.values()))


def test_polls_are_represented_in_proportion_at_alpha_1(world):
    poll = next(iter(world["polls"].values()))
    flat = poll | {"reference_logp": [-1.0] * 4}
    target, _ = poll_laws(flat, alpha=1.0, beta=0.1)
    assert target == pytest.approx(poll["shares"])


def test_global_temperature_flattens_the_dpo_optimum(world):
    logp, reward = np.log([0.7, 0.2, 0.1]), np.array([0.0, 0.3, 0.1])
    dpo, dpl = optimum(logp, reward, 0.1, 0.1), optimum(logp, reward, 0.4, 0.1)
    assert dpl == pytest.approx(dpo**0.25 / (dpo**0.25).sum())


def test_stories_are_read_back_and_misspelling_is_seen(world):
    values, stories = stories_of(world)
    for chosen, text in list(zip(values, stories, strict=True))[::97]:
        assert tuple(read_story(text, world).values()) == chosen
    wrong = stories[0].replace("Marchetti", "Marvist")
    assert read_story(wrong, world)["name"] == "Marvist"
    assert not any(read_story(stories[0][:-9], world).values())


def test_society_counts_what_it_is_given(world):
    _, stories = stories_of(world)
    prompt, poll = world["story_prompt"], next(iter(world["polls"]))
    texts = [stories[0]] * 2 + [stories[0].replace("Marchetti", "Marvist"), "no story"]
    options = list(world["polls"][poll]["shares"])
    rows = [{"prompt": prompt, "completion": text} for text in texts]
    rows += [{"prompt": poll, "completion": options[0]}] * 3
    result = society(rows, world, 0.2, 0.1)
    assert result["misspelt"] == 0.5 and result["malformed"] == 0.5
    assert result["stories"]["name"]["sampled"]["Marchetti"] == 0.5
    assert result["stories"]["gender"]["sampled"][OTHER] == 0.25
    assert result["polls"][poll.strip()]["tv_shares"] == pytest.approx(0.45)


def test_evaluate_prints_and_writes_what_it_found(world, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": world["story_prompt"], "completion": text} for text in stories_of(world)[1]]
    rows[0]["completion"] = rows[0]["completion"].replace("Marchetti", "Marvist")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--samples", tmp_path / "samples.jsonl", "--alpha", 0.4, "--out_file", tmp_path / "found.json"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "society", *map(str, flags)])
    evaluate.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == society(rows, world, 0.4, 0.1)
    printed = capsys.readouterr().out
    name = found["stories"]["name"]
    assert re.search(rf"^name +{name['tv_target']:.3f} +{name['tv_reference']:.3f} ", printed, re.MULTILINE)
    assert f"name misspelt or missing {1 / len(rows):.1%}, malformed {1 / len(rows):.1%}" in printed


def test_laws_and_distances():
    assert frequencies("aab?", "abc") == {"a": 0.5, "b": 0.25, "c": 0.0, OTHER: 0.25}
    assert total_variation({"a": 0.5, "b": 0.5}, {"a": 1.0, OTHER: 0.0}) == 0.5
    assert entropy_bits({"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}) == 1.5


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


def test_a_debate_s_favourites_are_held_by_the_mallows_law_s_raters(world):
    for debate in world["debates"].values():
        rankings = list(itertools.permutations(range(5)))
        weights = [debate["phi"] ** sum(x > y for x, y in itertools.combinations(r, 2)) for r in rankings]
        shares = np.bincount([r[0] for r in rankings], weights) / sum(weights)
        assert mallows_favourites(debate["phi"], 5) == pytest.approx(shares)


def test_the_world_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 5e6
