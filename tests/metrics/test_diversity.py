"""evaluate.py diversity where files differ in their number of samples, or hold few words or texts."""

import json
import sys

import pytest

import evaluate
from conftest import lines
from metrics import formulas

WORDS = ["fig", "mud", "tea", "figs", "jam", "pie", "rye", "oat"]
TEXTS = [f"I like {word}, of course." for word in WORDS]


def write(path, groups):
    """Samples of prompts "0", "1", ...; groups[i] are the texts of prompt i."""
    rows = [{"prompt": str(i), "completion": text} for i, texts in enumerate(groups) for text in texts]
    path.write_bytes(lines(*rows))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs `evaluate.py diversity`; returns its metrics and what it printed on stderr."""

    def run(*flags):
        words = ["diversity", "--out_file", tmp_path / "out.json", "--overwrite", *flags]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        evaluate.main()
        return json.loads((tmp_path / "out.json").read_text())["metrics"], capsys.readouterr().err

    return run


def test_files_are_compared_by_equally_many_samples_of_each_prompt(run, tmp_path):
    eight = write(tmp_path / "eight.jsonl", [TEXTS, TEXTS[::-1], TEXTS[:3]])
    few = write(tmp_path / "few.jsonl", [TEXTS[:4], TEXTS[:3:-1], TEXTS])
    for flags in (["--samples", eight, "--baseline", few], ["--samples", few, "--baseline", eight]):
        result, printed = run(*flags)
        for name, row in result.items():
            assert row["difference"]["mean"] == 0, name
        expected = [formulas.distinct_n(texts, 1) for texts in (TEXTS[:4], TEXTS[:3:-1], TEXTS[:3])]
        mean = result["distinct-1"]["samples"]["mean"]
        assert mean == pytest.approx(sum(expected) / 3)
        assert f"warning: {eight}: the first 4 of up to 8 samples" in printed
        assert f"warning: {few}: the first 4 of up to 8 samples" in printed
    alone, printed = run("--samples", eight)  # without another file, all samples count
    assert alone["distinct-1"]["samples"]["mean"] < mean - 0.05
    assert not printed
    assert not run("--samples", eight, "--baseline", eight)[1]


def test_texts_of_one_word_have_a_table(run, tmp_path):
    result, _ = run("--samples", write(tmp_path / "samples.jsonl", [WORDS, WORDS[:4] * 2]))
    assert result["distinct-1"]["samples"]["mean"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["distinct-2"] == result["EAD-2"] == {}  # no text has a 2-gram


def test_without_two_samples_of_a_prompt_there_is_no_diversity(refused, tmp_path):
    single = write(tmp_path / "single.jsonl", [TEXTS[:1]] * 3)
    fragment = "diversity needs two samples of a prompt"
    refused(evaluate, ["diversity", "--samples", single], f"{single}: {fragment}; see sample.py")


def test_a_baseline_without_two_samples_of_a_prompt_is_refused(tmp_path, monkeypatch):
    many = write(tmp_path / "many.jsonl", [TEXTS] * 3)
    single = write(tmp_path / "single.jsonl", [TEXTS[:1]] * 3)
    words = ["evaluate.py", "diversity", "--samples", many, "--baseline", single]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with pytest.raises(evaluate.InputError, match=r"two samples of a prompt, in .* too"):
        evaluate.main()
