"""experiments/real.py: features, the reference's temperature, the known optimum, and a short run."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from common.files import InputError
from common.rows import read_rows
from core.hub import load_model
from core.model import Stats, pair_stats
from core.pairs import pack, tokenize
from data.society.truth import list_stories, optimum
from experiments import lab, real, real_settings, real_texts
from experiments.real_texts import RealConfig, features, measure, utility
from scripts import SOCIETY, call
from tiny import lines
from train_dpl import DPLConfig, objective


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The doctor helps her patients.", "she unnamed The short nothing"),
        ("Dr. Emily Patel is kind, and he listens to children.", "he named other short nothing"),
        ("My sister, The Doctor, works on Monday.", "nobody unnamed other short nothing"),
        ("A theme, other than hers, that them she.", "she unnamed A short nothing"),
        ("There is the theatre.", "nobody unnamed other short nothing"),
        ("Amelia Inoue likes an old horse.", "nobody named other short nothing"),
        ("A pilot called Maya Lopez flies.", "nobody named A short nothing"),
        ("A gentle, gentle farmer; he and she.", "he unnamed A short a word"),
        ("The " + "one two six ten " * 4, "nobody unnamed The long nothing"),
        ("", "nobody unnamed other short nothing"),
    ],
)
def test_features(text, expected):
    assert " ".join(features(text).values()) == expected


def test_the_reference_is_the_model_at_a_token_temperature(tmp_path):
    folder = real_texts.write_reference(RealConfig(model=SOCIETY, temperature=0.5, out_dir=str(tmp_path)))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, base = (load_model(path)[0](ids).logits for path in (folder, SOCIETY))
    torch.testing.assert_close(ours, base / 0.5)


def test_a_reference_whose_last_norm_has_a_bias_is_refused(tmp_path, monkeypatch):
    model, tokenizer = load_model(SOCIETY)
    model.base_model.norm = torch.nn.LayerNorm(128)
    torch.nn.init.ones_(model.base_model.norm.bias)
    monkeypatch.setattr(real_texts, "load_model", lambda _: (model, tokenizer))
    with pytest.raises(InputError, match="last norm"):
        real_texts.write_reference(RealConfig(model=SOCIETY, out_dir=str(tmp_path)))


def test_weighted_texts_are_those_of_the_optimum(tmp_path):
    """The society's stories can be listed, so their optimum is known."""
    world = lab.read_world()
    config = RealConfig(model=SOCIETY, temperature=1.0, out_dir=str(tmp_path), max_new_tokens=32)
    folder = real_texts.write_reference(config)
    [rows] = real_texts.write_texts(config, "many", folder, [world["story_prompt"]], 1500)
    found = measure(rows, set(), np.array([utility(row["text"]) for row in rows]) / real_texts.BETA)
    stories = list_stories(world)
    u = np.array([utility(story) for story in stories])
    exact = optimum(np.array(world["story_reference_logp"]), u, real_texts.BETA, real_texts.BETA)
    for who in ("she", "he"):
        share = exact @ [features(story)["who"] == who for story in stories]
        error = math.sqrt(share * (1 - share) / found["effective"])
        assert found[who] == pytest.approx(share, abs=4 * error + 0.02)  # misspelt names: 0.02
    assert found["utility"] == pytest.approx(exact @ u, abs=0.03)
    nats = -exact @ np.log(exact)
    assert found["entropy"] == pytest.approx(nats, abs=0.3)
    assert found["effective"] < len(rows)


def test_texts_that_no_rater_wants_are_not_in_the_optimum():
    """Of four equally likely texts two are left, with the shares of HALVES."""
    texts = ("She sings.", "He sings.", "The sea.", "A song.")
    row = {"sampled_logp": math.log(1 / 4), "ref_logp": math.log(1 / 4), "finish": "eos", "ess": 4.0}
    rows = [row | {"text": text, "tokens": 2 if "sings" in text else 9} for text in texts]
    found = measure(rows, set(), np.array([real_texts.half_utility(text) for text in texts]))
    assert [found[who] for who in ("she", "he", "nobody")] == pytest.approx([0.62, 0.38, 0])
    assert found["entropy"] == pytest.approx(-0.62 * math.log(0.62) - 0.38 * math.log(0.38))
    assert found["tokens"] == pytest.approx(2)
    assert found["effective"] == pytest.approx(1 / (0.62**2 + 0.38**2))


def test_raters_choose_by_their_utilities(tmp_path):
    texts = [
        "The cat saw her.",
        "The cat saw him.",
        "A cat saw her.",
        "A cat saw a dog.",
        "A cat saw him and Tom.",
    ]
    rows = [{"text": text, "finish": "eos"} for text in (*texts, "") * 24]  # the first eighth is held out
    rows += [{"text": "The cut cat saw her", "finish": "length"}]
    config = RealConfig(rankings=400, out_dir=str(tmp_path))
    for name, (u, _) in real.POPULATIONS.items():
        paths = real_texts.write_rankings(config, name, ["Write."], [rows], u)
        rankings, held_out = ([row["ranking"] for _, row in read_rows(path)] for path in paths)
        assert len(rankings) == 400 and len(held_out) == 50
        assert {len(ranking) for ranking in rankings + held_out} == {8}
        assert {text for ranking in rankings for text in ranking} <= {*texts, "A cat saw her"}
        wins = {}
        for better, worse in (pair for ranking in rankings for pair in itertools.combinations(ranking, 2)):
            gain = round(u(better) - u(worse), 3)
            if gain:
                wins.setdefault(abs(gain), []).append(gain > 0)
        for gain, won in wins.items():
            expected = 1 / (1 + math.exp(-gain))
            assert np.mean(won) == pytest.approx(expected, abs=0.04)
    assert np.mean(won) == pytest.approx(0.62, abs=0.04)  # of "halves", which have one gain
    with pytest.raises(InputError, match="may be in one"):
        real_texts.write_rankings(config, "none", ["Write."], [rows], keep=lambda a, b: False)


def test_real_runs(tmp_path, monkeypatch, capsys):
    kept = ("DPO", "RL, α/β = 2", "halves: DPO")
    monkeypatch.setattr(real, "POLICIES", {name: real.POLICIES[name] for name in kept})
    sampled = {
        "top-p": {2: real.SAMPLED["top-p"][2]},
        "global temperature": real.SAMPLED["global temperature"],
    }
    monkeypatch.setattr(real, "SAMPLED", sampled)
    monkeypatch.setattr(real, "COMPARED", ("DPO",))
    curves = {"DPO": (["DPO", "DPO, top-p 2"], "o", "red"), "RL": (["RL, α/β = 2"], "D", "blue")}
    monkeypatch.setattr(real, "CURVES", curves)
    flags = {"model": SOCIETY, "prompts": "data/society/story.jsonl", "embedder": SOCIETY, "seeds": 1}
    flags |= {"rankings": 16, "reference_samples": 64, "samples": 8, "rl_steps": 1, "max_new_tokens": 24}
    out, picture = tmp_path / "real", tmp_path / "real.png"
    call(real, **flags, out_dir=out, out_file=picture)
    table = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert set(results) >= {*kept, "reference", "DPO, top-p 2", "optimum, α = β", "halves: optimum, α = β"}
    assert f"{results['DPO'][0][0]['utility']:.2f} ± 0.00" in table
    for name in ("real.png", "real_who.png", "real_runs.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    # again: nothing is trained or sampled
    before = {path: path.stat().st_mtime_ns for path in (out / "texts").iterdir()}
    call(real, **flags, out_dir=out, out_file=picture)
    with pytest.raises(InputError, match="--rankings 32: the run to --resume had 16"):
        call(real, **flags | {"rankings": 32}, out_dir=out, out_file=picture)
    assert {path: path.stat().st_mtime_ns for path in (out / "texts").iterdir()} == before


def test_settings_run(tmp_path, monkeypatch, capsys):
    kept = ("DPO", "DPL", "per token", "similar length", "off policy", "RL")
    settings = {name: value for name, value in real_settings.SETTINGS.items() if name in kept}
    monkeypatch.setattr(real_settings, "SETTINGS", settings)
    flags = {"model": SOCIETY, "prompts": "data/society/story.jsonl", "out_dir": tmp_path / "real"}
    flags |= {"rankings": 16, "reference_samples": 64, "samples": 8, "max_new_tokens": 24}
    call(real_settings, **flags, out_file=tmp_path / "settings.png")
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "real/results.json").read_text())
    assert list(results) == ["reference", *kept]
    for name, [[row]] in results.items():
        assert row["J 2"] == pytest.approx(row["utility"] + 0.8 * row["entropy"] - 0.4 * row["cross_entropy"])
        assert f"{row['J 2']:.2f} ± 0.00" in table, name
    assert (tmp_path / "settings.png").stat().st_size > 10_000


def test_the_loss_of_the_raters_utility(tmp_path):
    """Two texts that she or he is in differ by 1.2 nats: log(1 + exp(-1.2)) and log(1 + exp(1.2))."""
    texts = ["She sings.", "He sings."]
    rows = [{"ranking": texts}, {"ranking": [real_texts.message("assistant", text) for text in texts[::-1]]}]
    (tmp_path / "rankings.jsonl").write_bytes(lines(*rows))
    expected = (math.log1p(math.exp(-1.2)) + math.log1p(math.exp(1.2))) / 2
    assert real.utility_loss(tmp_path / "rankings.jsonl") == pytest.approx(expected)


def test_the_loss_of_a_ranking_is_the_mean_over_its_pairs(tmp_path, tiny_model_folder):
    model, tokenizer = load_model(tiny_model_folder)
    texts = ["a", "be", "big", "The fig", "bee", "fig", "a bee", "The"]
    rows = [{"prompt": "The", "ranking": texts}, {"prompt": "bee", "ranking": texts[::-1]}]
    (tmp_path / "rankings.jsonl").write_bytes(lines(*rows))
    examples = real.load_rankings(str(tmp_path / "rankings.jsonl"), tokenizer, 64, False)
    config = DPLConfig(model=SOCIETY, data="x", alpha=0.4, beta=0.1)
    ref = -torch.arange(16.0).view(2, 8)
    found = real.ranking_objective(pair_stats(model, pack(examples)), Stats(ref, ref), config=config)
    for i, row in enumerate(rows):
        values = []
        for better, worse in itertools.combinations(range(8), 2):
            pair = {"prompt": row["prompt"], "chosen": row["ranking"][better]}
            pair |= {"rejected": row["ranking"][worse]}
            policy = pair_stats(model, pack(tokenize([pair], tokenizer, 64)))
            values.append(objective(policy, Stats(ref[i : i + 1, [better, worse]], ref), config=config))
        loss, margin = (torch.cat([v[key] for v in values]) for key in ("loss", "reward_margin"))
        torch.testing.assert_close(found["loss"][i], loss.mean())
        torch.testing.assert_close(found["accuracy"][i], (margin > 0).float().mean())


def test_names_of_files_differ_and_every_way_to_sample_is_drawn():
    for names in (real.POLICIES, real_settings.SETTINGS, real_settings.KEEP):
        assert len(set(map(real_texts.slug, names))) == len(names)
    drawn = [name for names, *_ in real.CURVES.values() for name in names]
    ways = [f"DPO, {way} {t}" for way, settings in real.SAMPLED.items() for t in settings]
    assert set(drawn) == {"reference", *ways, *(n for n in real.POLICIES if not n.startswith("halves"))}
    assert all(drawn.count(name) == 1 for name in drawn if name != "DPO")
