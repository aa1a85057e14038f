"""What is read in a judge's answer, and how a question is filled in."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.files import fill
from metrics.judge import rating
from metrics.winrate import verdict


@given(st.dictionaries(st.sampled_from(["a", "b", "ab"]), st.text("ab{}\\"), min_size=1), st.text("ab{}"))
def test_fill_replaces_in_one_pass(values, template):
    parts = re.split(r"\{(" + "|".join(values) + r")\}", template)  # odd ones are names
    expected = "".join(values[part] if i % 2 else part for i, part in enumerate(parts))
    assert fill(template, **values) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: 4\nThey differ.", 4),
        ("**Rating:** 4/5", 4),
        ("__Rating: 3__", 3),
        ("rating: **2** / 5, since 3 of 4 agree", 2),
        ("Rating = 3.5.", 3.5),
        ("Rating: 3\n- 2 of them agree\nRating: 5", 3),
        ("I use Rating: X.\nRating: 2", 2),
        ("<think>Rating: 1?</think>Rating: 5 out of 5", 5),
        ("<think>Rating: 1?", None),
        *((text, None) for text in ("", "4", "Rating", "Rating: X", "They rate 4.", "underrating: 4")),
        *((f"Rating: {number}", None) for number in ("0", "6", "-3", "45", "7/10", "4 out of 10")),
        *((f"Rating: {number}", None) for number in ("3-4", "3 – 4", "3 or 4", "1,5", "4th", "4/50")),
    ],
)
def test_ratings(text, expected):
    assert rating(text) == expected


@given(st.text(), st.sampled_from(["Rating: {}", "**rating**: {}/5", "RATING = `{}`"]), st.integers(-9, 99))
def test_a_rating_is_read_if_it_is_on_the_scale(explanation, form, number):
    text = f"{form.format(number)}\n{explanation.replace('</think>', '')}"
    assert rating(text) == number if 1 <= number <= 5 else rating(text) != number


@given(st.text("[]ABC \n"), st.sampled_from("ABC"), st.text("[]abc \n"))
def test_the_last_verdict_counts(before, letter, after):
    assert verdict(f"{before}[[{letter}]]{after}") == {"A": "A", "B": "B", "C": "tie"}[letter]
    assert verdict(after) is verdict(f"<think>[[A]]{after}") is verdict(f"[[B]]</think>{after}") is None
