r"""Final answers, their spellings, and their equality where math-verify is not needed: cases by hand."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics import equality
from metrics.equality import answer_key, answers_equal, gsm8k_answer, math_answer


@pytest.fixture
def no_child(monkeypatch):
    """Fail if math-verify is asked."""
    monkeypatch.setattr(equality, "_start_child", lambda: pytest.fail("math-verify was asked"))


# ---- GSM8K


@pytest.mark.parametrize(
    "text, answer",
    [
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs\n#### 18", "18"),
        ("#### 18\n\nQuestion: 7 + 8?\n#### 15", "18"),  # the model goes on
        ("####-3.50 dollars", "-3.5"),
        ("#### The answer is $1,234.", "1234"),
        ("5 and 6\n####\n7", None),  # nothing on the line of ####
        ("5\n#### none", None),
        ("It costs $1,000.00 dollars.", "1000"),
        ("so $ 5", "5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5.", "-5"),
        (r"\$12", "12"),
        (r"Thus \(x = -7\).", "-7"),
        (r"\boxed{18}.", "18"),
        ("**18**", "18"),
        ("5%", "5"),
        ("5kg", "5"),
        ("is 1.5.", "1.5"),
        ("is 1.", "1"),
        (".5", "0.5"),
        ("wait...5", "5"),
        ("12,000,000 people", "12000000"),
        ("1,2,3", "3"),
        ("minus: −3", "-3"),
        ("3-4", "4"),
        ("3–4 days", "4"),
        ("50%-60%", "60"),
        ("2024-05-06", "6"),
        ("(-5)", "-5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("1e3", "1000"),
        ("1.25E-2 m", "0.0125"),
        ("3e5x", "3"),
        ("1e99999", "1"),  # too large to write out
        ("1/2 cup", "1/2"),
        ("3/04.", "3/4"),
        ("1/0", "0"),  # no fraction
        (r"so \boxed{70{,}000} dollars", "70000"),
        (r"It earns \$1{,}500.", "1500"),
        (r"a loss of -\$1{,}500.50", "-1500.5"),
        ("a debt of -¥5", "-5"),
        (r"11,\! 111,\! 111", "111"),  # a list
        (r"10,\!080 ways", "10080"),
        (r"\boxed{\$2\,000\text{ per week}}", "2000"),
        (r"\boxed{18\text{ cm}^2}", "18"),
        (r"18 m^{3}", "18"),
        (r"10^{3}", "3"),
        (r"3{,}5 or 3\,4", "4"),
        ("<think>#### 42? Or 5.</think>\nSo it is 18.", "18"),
        ("#### 42?</think>\n#### 18\n#### 7", "18"),  # the prompt opened it
        ("<think>One</think> #### 18 <think>Or 7?", "18"),
        ("<think>It may be #### 42", None),  # cut off
        ("#### Solution\n4*12=48\n\n#### 45", "45"),  # a heading
        ("#### Step 1: Add\n#### **$45**\nQ: ...\n#### 7", "45"),
        ("#### Solution\n#### x = 5", "5"),
        ("5\n#### none", None),
        ("CO2 and x5", None),
        ("no number", None),
        ("", None),
    ],
)
def test_gsm8k_answer(text, answer):
    assert gsm8k_answer(text) == answer


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${}", "{} dollars.", "{}%", "**{}**", "= {}."])
)
def test_gsm8k_answer_does_not_depend_on_the_spelling(number, form):
    for spelling in (
        f"{number}",
        f"{number:,}",
        f"{number}.0",
        f"{number:,}.00",
        f"{number}".replace("-", "−"),
        *(f"{number:,}".replace(",", comma) for comma in ("{,}", r"\,", r"\ ", r",\!", "\u2009", "\u202f")),
    ):
        assert gsm8k_answer("2 + 2 = 4, so " + form.format(spelling)) == str(number)
        assert gsm8k_answer(f"#### {form.format(spelling)}\n#### 7") == str(number)


@given(st.decimals(-(10**6), 10**6, places=3))
def test_gsm8k_answer_reads_decimals(number):
    shortest = f"{number:.3f}".rstrip("0").rstrip(".") if number else "0"
    assert gsm8k_answer(f"{number:.3f}") == gsm8k_answer(f"{number:.3f}00 m") == shortest


def test_gsm8k_answer_of_huge_numbers(no_child):
    start = time.monotonic()
    digits = "9" * 10**5  # int() would refuse them
    assert gsm8k_answer(f"#### {digits}.0") == digits
    assert gsm8k_answer("1" + ",222" * 10**5) == "1" + "222" * 10**5
    assert answers_equal(digits, digits + ".0") and not answers_equal(digits, digits + "1")
    assert time.monotonic() - start < 30  # seconds


# ---- MATH


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ 2 }.", "2"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\text{a {b} c}}}", r"\text{a {b} c}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1\\}", r"1\\"),  # an escaped backslash, then the closing brace
        (r"\boxed{x=\boxed{5}}", "5"),
        (r"$\boxed 5$ is it", "5"),
        (r"\boxed  {7}", "7"),
        (r"\(\boxed5\)", "5"),
        ("\\boxed{1,\n2}", "1,\n2"),
        (r"\boxed{1} then \boxed{2", None),  # cut off
        (r"<think>Or \boxed{1}?</think> It is \boxed{2}.", "2"),
        (r"<think>Or \boxed{1}?</think> It is 2.", None),
        (r"<think>Or \boxed{1}?", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed", None),
        (r"\boxedfive", None),
        ("5", None),
    ],
)
def test_math_answer(text, answer):
    assert math_answer(text) == answer


# ---- equality by spelling and by numbers


@pytest.mark.parametrize(
    "gold, answer",
    [
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\frac{1}{2}", r"\tfrac 1{2}"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        ("-1/2", r"-\frac{2}{4}"),
        (".5", "0.50"),
        ("3", "3.0"),
        ("5", " 5. "),
        ("1000", "1,000"),
        ("10000", "10{,}000"),
        ("10000", r"10\,000"),
        ("11111111100", r"11,\! 111,\! 111,\! 100"),
        (r"\$32,\!348", "32348"),
        ("-1,000,000", "−1000000"),
        (r"50\%", "50"),
        ("90", r"90^\circ"),
        ("90", r"90^{\circ}"),
        ("90", "90°"),
        (r"5\text{ cm}^2", "5"),
        (r"5\text{ apples}", r"5 \mathrm{ apples}"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
        ("5 dollars", "5"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\sqrt2", r"$\sqrt{2}$"),
        (r"x^{2}", "x^2"),
        ("52_8", "52_{8}"),
        (r"2\,\pi", "2π"),
        (r"\text{Monday}", "monday"),
        (r"\text{(C)}", "C"),
        (r"\textbf{(C)}", r"\text{C}"),
        (r"1\frac{1}{2}", "1 1/2"),
        ("2(x+1)", r"2\cdot\left(x+1\right)"),
    ],
)
def test_equal_spellings_and_numbers_need_no_math_verify(no_child, gold, answer):
    assert answers_equal(gold, answer) and answers_equal(answer, gold)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("5", "6"),
        ("1/3", "0.333333"),
        ("0.0000001", "0.0000002"),
        ("1000000", "1000001"),
        ("1,000", "1"),
        (r"50\%", r"5\%"),
        ("1011_2", "1011_3"),
        (r"6\text{ a.m.}", r"6\text{ p.m.}"),
        ("11/2", r"\frac{1}{12}"),
        ("5", "-5"),
        ("x" * 2000, "x" * 2001),  # too long for math-verify
    ],
)
def test_different_numbers_need_no_math_verify(no_child, gold, answer):
    assert not answers_equal(gold, answer) and not answers_equal(answer, gold)


@pytest.mark.parametrize("empty", [None, "", " ", "$$", r"\,", r"\text{}"])
def test_an_empty_answer_equals_nothing(no_child, empty):
    assert answer_key(empty) == ""
    for other in (None, "", empty, "5"):
        assert not answers_equal(empty, other) and not answers_equal(other, empty)


@pytest.mark.parametrize(
    "answer, key",
    [
        (r"\dfrac12", "1/2"),
        (r"\dfrac{x}2", r"\frac{x}{2}"),
        ("$1,000.00$", "1000"),
        ("1, 000", "1,000"),  # two numbers
        (r"\text{Very Good}", "verygood"),
        ("AB", "AB"),  # a segment
        ("ab", "ab"),  # a product
        ("X", "X"),
        (r"6\text{ p.m.}", "6p.m."),
        (r"2\text{ or }3", "2or3"),
        ("0.333...", "0.333..."),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_answer_key(answer, key):
    assert answer_key(answer) == key
