r"""What a text's final answer is, and whether two answers are equal.

A sampled solution counts as correct if its final answer equals the reference answer.

    gsm8k_answer    the number after "####", else the last number of the text    (GSM8K, Cobbe et al. 2021)
    math_answer     the LaTeX in the last \boxed{}                               (MATH, Hendrycks et al. 2021)
    after_thinking  the text without what a reasoning model thinks, where the first two do not look
    answers_equal   true for \frac{1}{2} and 0.5
    answer_key      an answer in one fixed spelling

answers_equal compares in three steps:

1. Spelling. Answers with the same answer_key are equal: \dfrac12 and \frac{1}{2}.
2. Numbers. Two integers, decimals or fractions of integers are compared exactly: 0.333333 is not 1/3.
3. Mathematics. The package math-verify reads all other answers into sympy: x^2-1 equals (x-1)(x+1). Decimals
   become fractions, rational numbers are compared exactly, and irrational ones to DIGITS digits.

Two traps:
- A model can write anything, and sympy would compute 9^{9^{9^9}} for years. math-verify therefore runs in a
  child process with a limit on time and memory, and False means "not shown to be equal".
- Some texts have no readable answer. The first two functions return None for them. Report how many there are.

    python -c "from metrics.equality import answers_equal as equal; print(equal(r'\sqrt2/2', r'1/\sqrt{2}'))"
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction

CPU_SECONDS = 5  # for one comparison. CPU time: the verdict must not depend on what else the machine does
WALL_SECONDS = 30  # for one comparison, in case the machine gives the child no CPU time
MEMORY = 2 << 30  # bytes, for the child
MAX_LENGTH = 1000  # characters; math-verify is not asked about longer answers
DIGITS = 1000  # irrational numbers that agree in so many significant digits are equal

# ---- the answer of a text

NUMBER = re.compile(
    r"(?P<minus>(?<![A-Za-z0-9)\]%$])-)?"  # 3-4 has no negative number
    r"(?:\\?[$€£¥₹] ?(?P<inner_minus>-)?)?"
    r"(?<![A-Za-z0-9])(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)|(?<!\.)(?=\.[0-9]))"
    r"(?:(?<=[0-9])/(?P<below>0*[1-9][0-9]*)(?![0-9/])"
    r"|(?:\.(?P<decimals>[0-9]+))?(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?!\w))?)"
)
NUMBER_RULES = [  # before NUMBER: thousands in LaTeX or with thin spaces, 70{,}000 and 1\,500; the 2 of m^2
    (r"(?<=[0-9])(?:\s*\{\s*,\s*\}\s*|,?\\[,!;: ]|[~\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),
    (r"(?<=[A-Za-z}])\^\{?-?[0-9]+\}?", ""),
]
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
UNICODE = str.maketrans({"−": "-", "–": "-", "－": "-", "°": r"^\circ ", "π": r"\pi "})


def after_thinking(text: str) -> str:
    """What follows the last </think>, up to a <think> after it: "" for thinking that was cut off."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def gsm8k_answer(text: str) -> str | None:
    r"""The final number of a GSM8K solution in one fixed spelling: "1000" for "#### $1,000.00 dollars".

    The answer is the first number on the line of the first "####" that a number follows, because a model may
    write headings with "####", and may go on with another question. If none follows, it is the first number
    on such a line; in a text without "####" it is the last number of the text. Thinking is left out. Signs,
    decimals, thousands (1,000 and 1{,}000) and exponents (1e3) are read. Currency, units and zeros that
    change nothing are dropped. A fraction of integers stays a fraction, "1/2". The - of "3-4" and of dates is
    not a sign. Of a mixed number only a part is read: "#### 5 1/2" gives 5.

    Returns None if there is no number, or none on the line of "####". (Cobbe et al. 2021)
    """
    text = after_thinking(text)
    marked = re.findall(r"####([^\n]*)", text)
    found = [line for pattern in (r"\W*\d", r".*\d") for line in marked if re.match(pattern, line)]
    line = (found + marked + [text])[0]
    numbers = list(NUMBER.finditer(_apply(NUMBER_RULES, line.translate(UNICODE))))
    if not numbers:
        return None
    number = numbers[0 if marked else -1]
    sign = "-" if number["minus"] or number["inner_minus"] else ""
    return _spell_number(sign, number["whole"], number["decimals"], number["exponent"], number["below"])


def _spell_number(
    sign: str, whole: str | None, decimals: str | None, exponent: str | None, below: str | None
) -> str:
    """One spelling for each number, from strings: int() refuses more than 4300 digits."""
    whole, decimals = (whole or "").replace(",", ""), decimals or ""
    digits, point = whole + decimals, len(whole) + int(exponent or 0)
    digits = "0" * -point + digits + "0" * (point - len(digits))
    whole, decimals = digits[: max(point, 0)].lstrip("0") or "0", digits[max(point, 0) :].rstrip("0")
    value = whole + (f".{decimals}" if decimals else "") + (f"/{below.lstrip('0')}" if below else "")
    return value if whole == "0" and not decimals else sign + value


def math_answer(text: str) -> str | None:
    r"""The LaTeX in the last \boxed{} or \fbox{} of a text, after its thinking.

    Braces inside the box are matched; \{ and \} are not counted. "\boxed 5" has no braces:
    its answer ends at the next $, \), \] or line end, as in the MATH authors' code. Of two nested boxes,
    \boxed{x=\boxed{5}}, the inner one is the last.

    Returns None if there is no box, or if the last one is empty or not closed. A text that stops inside its
    last box was cut off, and an earlier box may hold an intermediate result. (Hendrycks et al. 2021)
    """
    text = after_thinking(text)
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    rest, depth = text[boxes[-1].end() :], 0
    if not rest.startswith("{"):
        return re.split(r"[$\n]|\\[)\]]", rest, maxsplit=1)[0].strip() or None
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \\. skips an escaped brace or backslash
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip() or None
    return None


# ---- one spelling

TEXT = r"\\(?:text(?:rm|bf|it|normal)?|mbox|mathrm|mathbf|operatorname)\s*"
PLAIN_RULES = [  # (pattern, replacement) in this order; a backslash pair, the end of a matrix row, is kept
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?|\\(?:display|text)style(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d)", ""),  # thousands: 1{,}000 and 1,\!000
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degree(?![A-Za-z])", ""),
    (r"(\\\\)|\\[,!;:> ()\[\]]|\\q?quad(?![A-Za-z])|~|\\?\$", r"\1 "),
    (r"\s+", " "),
    (r"^[ +-]*[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", "")),
    (r"(?<=\d) ?i(?![A-Za-z])", " i"),  # math-verify takes the i of 2i for a real variable
    (r"(\d) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2 would become 11/2 without its space
    (r"(?<![\w.^])(\d+(?:\.\d+)?) ?\(", r"\1\\cdot("),  # math-verify takes 2(1.5) for 2 + 1.5
    (r"(?<!\.)\. ?$", ""),
]
KEY_RULES = [  # after PLAIN_RULES, to compare strings; math-verify still gets %, units and \text{}
    (r"\\?%", ""),
    # a unit after a number: "5\text{ cm}^2", but not the time "5\text{ p.m.}"
    (rf"^((?:(?!{TEXT}\{{).)*[\d}})]) ?{TEXT}\{{(?!\W*[ap]\W*m\b)[^{{}}]*\}}(?:\^\{{?\d\}}?)?$", r"\1"),
    (r"(?<=\d) ?(?:dollars?|cents?|degrees?|units?|percent)$", ""),
    (rf"{TEXT}\{{([^{{}}]*)\}}", r"\1"),
    (r"(?<!\d) | (?!\d)|(?<=\d) (?=\d{3}(?!\d))", ""),  # 10 000 is 10000, but 1 2 is not 12
    (r"\\frac(\w)", r"\\frac{\1}"),
    (r"\\frac(\{[^{}]*\})(\w)", r"\\frac\1{\2}"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"([\^_])\{(\w)\}", r"\1\2"),
    (r"^(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3"),
    (r"^\(([A-Za-z])\)$", r"\1"),  # multiple choice: (A)
]
PLAIN_NUMBER = r"[+-]?(?:[0-9]+/0*[1-9][0-9]*|[0-9]+\.?[0-9]*|\.[0-9]+)"
# the base in 1011_2, a.m. and p.m., which math-verify ignores
BASE_OR_AMPM = r"(?<=\d)(?:_\{?(\d+)|([ap])\.?m)"


def answer_key(answer: str | None) -> str:
    r"""An answer in one spelling, to count different answers: equal keys mean equal answers.

    Takes LaTeX or plain text. White space, $, %, degrees, \left, \right, \text{}, units after a number,
    thousands commas and zeros that change nothing are dropped, \frac12 becomes \frac{1}{2}, and words
    that are not all capitals become lower case. Equal answers can still have different keys: x+1 and 1+x.

    Returns "" for None and for an empty answer. (Most rules are those of the MATH authors' code.)
    """
    key = _apply(KEY_RULES, _plain(answer or ""))
    number = re.fullmatch(r"([+-]?)([0-9]*)\.?([0-9]*)(?:/(0*[1-9][0-9]*))?", key)
    if number and (number[2] or number[3]):
        return _spell_number(number[1].strip("+"), number[2], number[3], None, number[4])
    is_name = len(key) == 1 or key.isupper()  # the variable x is not X, the segment AB is not ab
    return key.casefold() if key.isalpha() and not is_name else key


def _plain(answer: str) -> str:
    r"""The answer for math-verify: without \left, \right, spacing commands, $, degrees, thousands commas."""
    return _apply(PLAIN_RULES, answer.translate(UNICODE)).strip()


def _apply(rules: list, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


# ---- equality


def answers_equal(gold: str | None, answer: str | None) -> bool:
    r"""Whether an answer equals the reference answer `gold`.

    Takes two strings of LaTeX or plain text, as gsm8k_answer and math_answer return them, from any thread.
    The order counts in tuples, intervals and matrices; it does not in \{1,2\} and in 1,2. The answers (1,2),
    [1,2] and \{1,2\} differ. 50\% equals 50 and 0.5. x=5 equals 5 but not y=5, and 2x=6 is not 6. x<3
    equals (-\infty,3). None and "" equal nothing. The verdict is the same with the two exchanged.

    Returns False also if math-verify fails or needs more than CPU_SECONDS or MEMORY, and if answers longer
    than MAX_LENGTH have different keys. Raises InputError if math-verify is needed and cannot be imported. It
    is not needed for two plain numbers. (https://github.com/huggingface/Math-Verify)
    """
    keys = [answer_key(gold), answer_key(answer)]
    if not all(keys):
        return False
    if keys[0] == keys[1]:
        return True
    marks = [re.findall(BASE_OR_AMPM, key.lower()) for key in keys]
    if (all(marks) and marks[0] != marks[1]) or max(len(gold), len(answer)) > MAX_LENGTH:
        return False
    if all(re.fullmatch(PLAIN_NUMBER, key) for key in keys) and ("%" in gold) == ("%" in answer):
        return Fraction(keys[0]) == Fraction(keys[1])
    return _ask_child(json.dumps([CPU_SECONDS, _plain(gold), _plain(answer)]))


_lock = threading.Lock()  # one question at a time
_child: subprocess.Popen | None = None  # started when first needed, because it imports sympy for a second


def _ask_child(question: str) -> bool:
    """Send one line to the child process and read its verdict; False if the time is up.

    If the child dies of anything else, a new child gets the question once more.
    """
    with _lock:
        for _ in range(2):
            try:
                child = _start_child()
                child.stdin.write(question + "\n")
                child.stdin.flush()
                verdict = child.stdout.readline()
            except BrokenPipeError:
                verdict = ""
            except BaseException:  # an interrupt: the unread verdict must not answer the next question
                _stop_child()
                raise
            if verdict:
                return verdict == "true\n"
            if _stop_child() in (-signal.SIGPROF, -signal.SIGALRM):
                return False  # out of time
        return False  # died twice on this question


def _start_child() -> subprocess.Popen:
    global _child
    if _child is None:
        _child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONHASHSEED": "0"},  # fixes the order of sympy's sets
            start_new_session=True,  # Ctrl-C is for the parent
        )
        first = _child.stdout.readline()
        if first != "ready\n":
            _stop_child()
            from common.files import InputError

            reason = first.strip() or "its process died"
            raise InputError(f"comparing answers needs math-verify ({reason}): pip install math-verify")
    return _child


def _stop_child() -> int | None:
    """Kill the child, if there is one; returns its exit code."""
    global _child
    child, _child = _child, None
    if child is None:
        return None
    child.kill()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    child.stdout.close()
    return child.wait()


atexit.register(_stop_child)


# ---- the child process


def _serve() -> None:
    """Main loop of the child process: read [CPU seconds, gold, answer] from stdin, print true or false.

    math-verify's own time-outs are Python signal handlers. They work in the main thread alone, and they wait
    for the end of one long integer power. Here the signals keep their default action: they end the process.
    """
    import resource

    replies, sys.stdout = sys.stdout, sys.stderr  # a library may print
    with contextlib.suppress(ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number in (signal.SIGPROF, signal.SIGALRM):  # the parent may have ignored or blocked them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    try:
        _make_exact()
        _verify("x+x", "2x")  # the imports and the tables of the parser: no comparison pays for them
    except ImportError as error:
        print(" ".join(str(error).split()), file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        seconds, gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(WALL_SECONDS)
        try:
            equal = _verify(gold, answer)
        except Exception:  # also RecursionError and MemoryError
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(json.dumps(equal), file=replies, flush=True)


def _make_exact() -> None:
    """Replace the two functions of math-verify that round, for this process.

    Its parser reads 0.1 as a float. It compares two numbers at an absolute tolerance, and everything on the
    way to them too, so that 2^{-60} equals 2^{-61} and (2^{2005}+1)/2^{2006} equals 1/2^{2006}.
    """
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify import grader
    from math_verify.grader import is_atomic_or_pct_atomic, safe_sympy_doit, sympy_numeric_eq
    from sympy import MatrixBase, MatrixExpr, Number, Rational
    from sympy.core.evalf import PrecisionExhausted

    def exact(a, b, *options) -> bool:
        kinds = [isinstance(x, (MatrixBase, MatrixExpr)) for x in (a, b)]
        kinds += [is_atomic_or_pct_atomic(x, Number) for x in (a, b)]
        if any(kinds) and sympy_numeric_eq(a, b, *options):  # element by element, or by ==
            return True
        difference = safe_sympy_doit(a - b)
        if not getattr(difference, "is_number", False):
            return False  # math-verify then simplifies the difference
        if difference.is_Rational:
            return not difference
        try:
            return difference.evalf(2, maxn=DIGITS, strict=True) == 0
        except PrecisionExhausted:
            return True

    grader.sympy_numeric_eq = exact
    _Latex2Sympy.parse_number = lambda _, text: Rational(text.replace(",", ""))


def _verify(gold: str, answer: str) -> bool:
    """math-verify's verdict in both orders. But a set is no tuple or interval, and [2,1] is not (2,1)."""
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.grader import is_assignment_relation, is_equation, take_last_relation
    from sympy import FiniteSet, Interval, Tuple

    latex = [LatexExtractionConfig()]  # without ExprExtractionConfig, which calls sympy's parse_expr, an eval
    values = []
    for text in (gold, answer):
        values += parse(rf"\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)[:1]
    if len(values) < 2:
        return False
    for i, (one, other) in enumerate((values, values[::-1])):
        if isinstance(one, FiniteSet) and isinstance(other, (Tuple, Interval)):
            return False
        if is_equation(one) and not is_equation(other):  # a+b=5 and f(2)=5 are 5, but 2x=6 is not 6
            if one.free_symbols and not is_assignment_relation(one):
                return False
            values[i] = take_last_relation(one).rhs
    if all(isinstance(value, Tuple) for value in values) and (gold[0], gold[-1]) != (answer[0], answer[-1]):
        return False
    options = {"allow_set_relation_comp": True, "timeout_seconds": None}
    return all(verify(*pair, **options) for pair in (values, values[::-1]))


if __name__ == "__main__":
    _serve()
