"""evaluate.py diversity where files differ in their number of samples, or hold few words or texts."""

import pytest

from common.files import InputError
from metrics import formulas
from tiny import lines

WORDS = ["fig", "mud", "tea", "figs", "jam", "pie", "rye", "oat"]
TEXTS = [f"I like {word}, of course." for word in WORDS]


def write(path, groups):
    """Samples of prompts "0", "1", ...; groups[i] are the texts of prompt i."""
    rows = [{"prompt": str(i), "completion": text} for i, texts in enumerate(groups) for text in texts]
    path.write_bytes(lines(*rows))
    return path


@pytest.fixture
def run(evaluated):
    """A function that runs `evaluate.py diversity`; returns its metrics and what it printed on stderr."""

    def run(**files):
        result, printed = evaluated("diversity", "--overwrite", **files)
        return result["metrics"], printed.err

    return run


def test_files_are_compared_by_equally_many_samples_of_each_prompt(run, tmp_path):
    eight = write(tmp_path / "eight.jsonl", [TEXTS, TEXTS[::-1], TEXTS[:3]])
    few = write(tmp_path / "few.jsonl", [TEXTS[:4], TEXTS[:3:-1], TEXTS])
    for files in ({"samples": eight, "baseline": few}, {"samples": few, "baseline": eight}):
        result, printed = run(**files)
        for name, row in result.items():
            assert row["difference"]["mean"] == 0, name
        expected = [formulas.distinct_n(texts, 1) for texts in (TEXTS[:4], TEXTS[:3:-1], TEXTS[:3])]
        mean = result["distinct-1"]["samples"]["mean"]
        assert mean == pytest.approx(sum(expected) / 3)
        assert f"warning: {eight}: only the first 4 of up to 8 samples" in printed
        assert f"warning: {few}: only the first 4 of up to 8 samples" in printed
    alone, printed = run(samples=eight)  # without another file, all samples count
    assert alone["distinct-1"]["samples"]["mean"] < mean - 0.05
    assert not printed
    assert not run(samples=eight, baseline=eight)[1]


def test_texts_of_one_word_have_a_table(run, tmp_path):
    result, _ = run(samples=write(tmp_path / "samples.jsonl", [WORDS, WORDS[:4] * 2]))
    assert result["distinct-1"]["samples"]["mean"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["distinct-2"] == result["EAD-2"] == {}  # no text has a 2-gram


@pytest.mark.parametrize("text", ["\0", "\u200b", "a"])
def test_texts_without_letters_or_words_count_as_one_word(run, tmp_path, text):
    result, _ = run(samples=write(tmp_path / "samples.jsonl", [[text] * 4]))
    assert result["distinct-1"]["samples"]["mean"] == 1 / 4
    assert result["distinct-2"] == result["EAD-2"] == {}


def test_a_baseline_without_two_samples_of_a_prompt_is_refused(run, tmp_path):
    many = write(tmp_path / "many.jsonl", [TEXTS] * 3)
    single = write(tmp_path / "single.jsonl", [TEXTS[:1]] * 3)
    with pytest.raises(InputError, match=r"two samples of a prompt, in .* too"):
        run(samples=many, baseline=single)
