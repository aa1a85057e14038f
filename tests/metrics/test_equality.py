r"""Equality by math-verify: cases by hand, hostile answers, and the death of the child process."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.files import InputError
from metrics import equality
from metrics.equality import answers_equal, gsm8k_answer, math_answer

BOUND = 30  # seconds: an answer that is never decided would take longer

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
        (r"(-\infty,3)", "x<3"),
        ("[-2,7]", r"-2 \le x \le 7"),
        ("(0,12.5)", "0 < x < 12.5"),
        (r"[2.5,\infty)", r"x\ge\frac52"),
        (r"0.1x+0.2x", "0.3x"),
        ("e^{0.5}", r"\sqrt{e}"),
        ("6.25\\pi", r"\frac{25\pi}{4}"),
        (r"33.3\%", "0.333"),
        ("1\\le x\\le2.5", "1\\le x\\le\\frac52"),
        ("2(1.5)", "3"),
        (r"2(\frac{3}{2})", "3"),
        (r"\sqrt{7+4\sqrt3}", r"2+\sqrt3"),
        (r"\sqrt[3]{7+5\sqrt2}", r"1+\sqrt2"),
        (r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt5}{4}"),
        (r"\frac{2^{2005}+1}{3\cdot2^{2006}}", r"\frac16+\frac{1}{3\cdot2^{2006}}"),
        (r"\frac{20!}{19!}", "20"),
        ("f(2)=5", "5"),
        ("2+3=5", "5"),
        ("a+b=12", "12"),
        (r"x=\pm2", "-2,2"),
    ],
)
def test_equal_mathematics(gold, answer):
    assert answers_equal(gold, answer) and answers_equal(answer, gold)


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
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        (r"\frac{1}{20!}", r"\frac{1}{19!}"),
        ("2^{-60}", "0"),
        (r"\frac{2^{2005}+1}{3\cdot2^{2006}}", r"\frac{1}{3\cdot2^{2006}}"),
        (r"\frac{2^{4000}+1}{2^{4000}}", "1"),
        (r"\sqrt2\cdot2^{-60}", r"\sqrt2\cdot2^{-61}"),
        (r"\sqrt{1+2^{-900}}", "1"),
        (r"1.5\times10^{-20}", r"2.5\times10^{-20}"),
        ("10^{20}+0.5", "10^{20}"),
        ("2^{-60}x", "2^{-61}x"),
        ("x<2^{-60}", "x<2^{-61}"),
        ("(0,2^{-60})", "(0,2^{-61})"),
        (r"\{1,2^{-60}\}", r"\{1,2^{-61}\}"),
        (r"\begin{pmatrix}2^{-60}\\2\end{pmatrix}", r"\begin{pmatrix}2^{-61}\\2\end{pmatrix}"),
        ("(-\\infty,3)", "x\\le3"),
        ("2x=6", "6"),
        ("x+2y-3z+1=0", "0"),
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
    monkeypatch.setattr(equality, "CPU_SECONDS", 0.3)
    start = time.monotonic()
    assert not answers_equal("7", answer)
    assert answers_equal(answer, answer)
    math_answer(rf"\boxed{{{answer}")
    gsm8k_answer(answer)
    assert time.monotonic() - start < BOUND


def test_worker_threads(monkeypatch):
    monkeypatch.setattr(equality, "CPU_SECONDS", 0.5)
    pairs = [("x+x", "2x"), ("7", "9^{9^{9^9}}"), ("x+x", "3x"), ("x+x", "x*2"), ("(1,x)", "(1,y)")]
    with ThreadPoolExecutor(3) as pool:
        verdicts = list(pool.map(lambda pair: answers_equal(*pair), pairs))
    assert verdicts == [True, False, False, True, False]


def test_a_killed_child_is_replaced():
    assert answers_equal("x+x", "2x")
    first = equality._child.pid
    os.kill(first, signal.SIGKILL)
    assert answers_equal("x+x", "2x") and not answers_equal("x+x", "3x")
    assert equality._child.pid != first


def test_an_interrupted_question_does_not_answer_the_next_one(monkeypatch):
    child = equality._start_child()

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        close = child.stdout.close

    monkeypatch.setattr(child, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        answers_equal("x+x", "2x")
    assert not answers_equal("x+x", "3x")


def test_the_child_ends_with_its_parent():
    code = "from metrics import equality as e; e.answers_equal('x+x', '2x'); print(e._child.pid)"
    root = Path(equality.__file__).parent.parent
    pid = int(subprocess.check_output([sys.executable, "-c", code], cwd=root, timeout=60))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_missing_math_verify_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    equality._stop_child()
    with pytest.raises(InputError, match="pip install math-verify") as error:
        answers_equal("x+x", "2x")
    assert "\n" not in str(error.value)
    assert answers_equal("1,000", "1000.0") and not answers_equal("1/2", "0.25")
