r"""Final answers and their equality: cases by hand, hostile answers, and the death of the child process."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import answers
from answers import answer_key, answers_equal, gsm8k_answer, math_answer
from files import InputError

BOUND = 30  # seconds: an answer that is never decided would take longer


@pytest.fixture
def no_child(monkeypatch):
    """Fail if math-verify is asked."""
    monkeypatch.setattr(answers, "_start_child", lambda: pytest.fail("math-verify was asked"))


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
    assert time.monotonic() - start < BOUND


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


# ---- equality by math-verify


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("x^2+2x+1", "(x+1)^2"),
        ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"\sqrt{8}", r"2\sqrt2"),
        (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"),
        (r"\frac{3\sqrt{3}}4", r"\frac34\sqrt3"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"50\%", "0.5"),
        (r"50\%", r"\frac{1}{2}"),
        ("3.5", r"3\frac12"),
        ("6.72\\times10^{-5}", ".0000672"),
        ("6 - 5i", r"- 5 i + 6"),
        ("x=5", "5"),
        ("y=2x+1", "2x-y+1=0"),
        (r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
        (r"\pm 2", "-2, 2"),
        ("3, 5, 7", "7,5,3"),
        (r"\{1,2\}", r"\{2,1\}"),
        (r"\{1,2\}", "2,1"),
        (r"2\text{ or }3", "3, 2"),
        (r"(3,\pi/2)", r"(3.0,\frac{\pi}{2})"),
        ("(1,2]", r"(1,\frac{4}{2}]"),
        (r"(-\infty,-1)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,-1)"),
        (r"\begin{pmatrix}-1/3\\2\end{pmatrix}", r"\begin{bmatrix} -\frac13 \\ 2.0 \end{bmatrix}"),
        (r"2^{10}", "1024"),
        (r"5x-7y+4=0", "4 + 5x = 7y"),
        ("52_8", "52"),
        (r"6\text{ p.m.}", "6"),
    ],
)
def test_equal_mathematics(gold, answer):
    assert answers_equal(gold, answer)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("x^2+2x+1", "(x+1)^3"),
        ("x^2+2x+1", "y^2+2y+1"),
        (r"\sqrt{8}", r"2\sqrt3"),
        (r"\frac{1}{3}", r"33.3\%"),
        (r"\pi", "3.14159265"),
        (r"10^{-7}", r"2\cdot10^{-7}"),
        ("x=5", "y=5"),
        ("x=5", "6"),
        ("(1,2)", "[1,2]"),
        ("(1,2]", "(1,2)"),
        ("(1,2]", "[1,2)"),
        (r"[2,\infty)", r"(2,\infty)"),
        ("(1,2)", "(2,1)"),
        ("(2,1)", "[2,1]"),
        ("(1,2)", r"\{1,2\}"),
        ("(1,2,3)", r"\{1,2,3\}"),
        ("(1,2)", "1,2"),
        ("(1,2)", "(1,2,3)"),
        (r"\{1,2\}", r"\{1,3\}"),
        ("5,6", "6"),
        ("3, 100", "3100"),
        ("12", "1 2"),
        ("(1,200)", "1200"),
        (r"1\pm\sqrt{2}", r"1+\sqrt{2}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\text{even}", r"\text{odd}"),
        (r"\text{dog}", "god"),
        (r"\text{A}", "B"),
        ("6-5i", "6+5i"),
        ("x<2", r"x\le2"),
        (r"\text{no solution}", "0"),
    ],
)
def test_different_mathematics(gold, answer):
    assert not answers_equal(gold, answer) and not answers_equal(answer, gold)


# ---- hostile answers and the child process


@pytest.mark.parametrize(
    "answer",
    [
        "{" * 10_000,
        "{" * 900,
        r"\frac{" * 100,
        r"\boxed{" * 100,
        "9**9**9",
        "9^{9^{9^9}}",
        "\\" * 999,
        "5 \x00 \ud800 x",
        "__import__('os').abort()",
    ],
)
def test_hostile_answers_take_bounded_time(monkeypatch, answer):
    monkeypatch.setattr(answers, "CPU_SECONDS", 0.3)
    start = time.monotonic()
    assert not answers_equal("7", answer)
    assert answers_equal(answer, answer)
    math_answer(rf"\boxed{{{answer}")
    gsm8k_answer(answer)
    assert time.monotonic() - start < BOUND


def test_worker_threads(monkeypatch):
    monkeypatch.setattr(answers, "CPU_SECONDS", 0.5)
    pairs = [("x+x", "2x"), ("7", "9^{9^{9^9}}"), ("x+x", "3x"), ("x+x", "x*2"), ("(1,x)", "(1,y)")]
    with ThreadPoolExecutor(3) as pool:
        verdicts = list(pool.map(lambda pair: answers_equal(*pair), pairs))
    assert verdicts == [True, False, False, True, False]


def test_a_killed_child_is_replaced():
    assert answers_equal("x+x", "2x")
    first = answers._child.pid
    os.kill(first, signal.SIGKILL)
    assert answers_equal("x+x", "2x") and not answers_equal("x+x", "3x")
    assert answers._child.pid != first


def test_an_interrupted_question_does_not_answer_the_next_one(monkeypatch):
    child = answers._start_child()

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        close = child.stdout.close

    monkeypatch.setattr(child, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        answers_equal("x+x", "2x")
    assert not answers_equal("x+x", "3x")


def test_the_child_ends_with_its_parent():
    code = "import answers; answers.answers_equal('x+x', '2x'); print(answers._child.pid)"
    root = Path(answers.__file__).parent
    pid = int(subprocess.check_output([sys.executable, "-c", code], cwd=root, timeout=60))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_missing_math_verify_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers._stop_child()
    with pytest.raises(InputError, match="pip install math-verify") as error:
        answers_equal("x+x", "2x")
    assert "\n" not in str(error.value)
    assert answers_equal("1,000", "1000.0") and not answers_equal("1/2", "0.25")
