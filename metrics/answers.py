"""evaluate.py answers: how often one of N samples solves a problem (DPL paper, section 4.2 and appendix C).

Each policy samples n completions per problem. All metrics are means over problems:

    best-of-N          probability that at least one of N samples is correct           (formulas.pass_at_k)
    chosen by reward   probability that the sample with the highest reward is correct  (formulas.best_of_n)
    unique answers     number of different answers among N samples / N; unreadable answers count as none

Each is the exact mean over all subsets of N of the n samples. Give DPO's samples first: the other policies
are compared with the first file. A sample belongs to the problem whose question its prompt asks. Problems
are rows of GSM8K or MATH, split into easy, medium and hard: MATH by level (1, 3, 5), GSM8K by the number of
samples that the model of --base_samples needs to solve the problem (at most 4, at most 64, more).

    python sample.py --prompts gsm8k.jsonl --prompt_template data/prompts/gsm8k.txt --stop Q: ...
    python sample.py --prompts math.jsonl --prompt_template data/prompts/math.txt --stop "###" ...
    python evaluate.py answers --problems gsm8k.jsonl --samples dpo.jsonl dpl.jsonl --picture best_of_n.png
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.files import InputError, write_json
from common.flags import Flags, flag, require
from common.rows import Sample, read_question, read_rows, read_samples, transcript
from metrics import formulas
from metrics.equality import answer_key, answers_equal, gsm8k_answer, math_answer
from metrics.tables import check_outputs, new_figure, sample_rewards, save_figure

LEVELS = {1: "easy", 3: "medium", 5: "hard"}  # of MATH
EASY, MEDIUM = 4, 64  # GSM8K: easy if the base model solves it within 4 samples, medium within 64
MARKERS = "osv^Dx+*"


@dataclass
class Config(Flags):
    """Flags of evaluate.py answers."""

    problems: str | None = flag(None, "Rows of GSM8K (question, answer) or MATH (problem, solution, level).")
    samples: list[str] | None = flag(None, "Files that sample.py wrote, one per policy, DPO's first.")
    base_samples: str | None = flag(None, "A base model's samples, to split GSM8K by difficulty.")
    reward_model: str | None = flag(None, "Also let this reward model choose one of the N samples.")
    chat: bool = flag(False, "Put string prompts through the reward model's chat template.")
    out_file: str | None = flag(None, "Also write all results to this file, as JSON.")
    picture: str | None = flag(None, "Also draw them into this file, .png or .pdf.")
    overwrite: bool = flag(False, "Replace --out_file and --picture.")
    seed: int = flag(0, "Seed of the bootstrap over problems.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "problems", self.problems is not None, "given")
        require(self, "samples", bool(self.samples), "given: one file or more")
        names = self.names()
        require(self, "samples", len(set(names)) == len(names), "files that differ in name or in folder")
        check_outputs(self)

    def names(self) -> list[str]:
        """Name of each policy in the results: its file's name, or its folder's if two files share a name."""
        paths = [Path(path).resolve() for path in self.samples]
        same = len({path.name for path in paths}) < len(paths)
        return [path.parent.name if same else path.stem for path in paths]


class Problem(NamedTuple):
    """A problem, its right answer, how to read a text's answer, and MATH's level if the row has one."""

    question: str
    gold: str
    read_answer: Callable[[str], str | None]
    level: int | None


def read_problems(path: str) -> list[Problem]:
    """Problems of a file. Raises InputError naming the row whose question or right answer cannot be read."""
    problems = []
    for where, row in read_rows(path):
        question = read_question(row, where)
        is_math = isinstance(row.get("solution"), str)
        text, read_answer = (row["solution"], math_answer) if is_math else (row.get("answer"), gsm8k_answer)
        gold = read_answer(text) if isinstance(text, str) else None
        if gold is None:
            raise InputError(
                f"{where}: needs an 'answer' with a number, or a 'solution' with a \\boxed answer"
            )
        level = re.search("[0-9]{1,9}", str(row.get("level", "")))  # "Level 5", 5 or 5.0
        problems.append(Problem(question, gold, read_answer, int(level[0]) if level else None))
    return problems


def match_samples(path: str, problems: list[Problem]) -> dict[int, list[Sample]]:
    """{index of the problem: its samples}. Raises InputError for a prompt without a problem's question."""
    by_problem: dict[int, list[Sample]] = {}
    questions = [problem.question.strip() for problem in problems]
    for samples in read_samples(path, allow_empty=True).values():
        prompt = transcript(samples[0].prompt)
        # the question asked comes last, after the examples; if two end there, the longer one is meant
        ends = [(prompt.rfind(q) + len(q), len(q), -i) for i, q in enumerate(questions) if q in prompt]
        if not ends:
            raise InputError(f"{path}: the prompt {prompt[-60:]!r} holds no question of --problems")
        by_problem.setdefault(-max(ends)[2], []).extend(samples)
    return by_problem


@cache
def is_right(gold: str, answer: str | None) -> bool:
    """Whether an answer is the right one; None is not."""
    return answer is not None and answers_equal(gold, answer)


class Graded(NamedTuple):
    """One policy's samples of the problems, in the order of the problems; n samples each."""

    correct: np.ndarray  # (problems, n)
    answers: list[list[str | None]]  # keys of the answers, None if unreadable


def grade(samples: dict[int, list[Sample]], problems: list[Problem], name: str) -> Graded:
    """Read and grade the answers of all samples, {index of the problem: n samples}."""
    correct, keys = [], []
    for index, group in tqdm(samples.items(), desc=f"grading {name}", unit="problem", disable=None):
        problem = problems[index]
        found = [problem.read_answer(sample.text) for sample in group]
        correct.append([is_right(problem.gold, answer) for answer in found])
        keys.append([None if answer is None else answer_key(answer) for answer in found])
    return Graded(np.array(correct, dtype=float), keys)


def split_problems(
    indices: list[int], problems: list[Problem], base: dict[int, list[Sample]] | None
) -> dict[str, np.ndarray]:
    """{"all", "easy", "medium", "hard": positions in `indices`}, empty splits left out.

    `base` holds the base model's samples. A GSM8K problem without a correct one is hard if it has at least
    MEDIUM samples. With fewer, its difficulty is unknown and it is in "all" only, as are MATH levels 2 and 4.
    """
    splits: dict[str, list[int]] = {"all": list(range(len(indices))), "easy": [], "medium": [], "hard": []}
    for position, index in enumerate(indices):
        problem = problems[index]
        if base is not None and problem.read_answer is gsm8k_answer:
            rights = [
                is_right(problem.gold, problem.read_answer(sample.text)) for sample in base.get(index, [])
            ]
            tries = rights.index(True) + 1 if True in rights else math.inf
            if tries < math.inf or len(rights) >= MEDIUM:
                splits["easy" if tries <= EASY else "medium" if tries <= MEDIUM else "hard"].append(position)
        elif problem.level in LEVELS:
            splits[LEVELS[problem.level]].append(position)
    return {name: np.array(positions) for name, positions in splits.items() if positions}


def unique_answers(answers: list[str | None], k: int) -> float:
    """Expected number of different answers among k of the samples, divided by k. (DPL paper, Figure 10)

    Value a, found in c_a of the n samples, is among k of them with the chance pass_at_k(n, c_a, k).
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return sum(formulas.pass_at_k(len(answers), c, k) for c in counts.values()) / k


def compute_curves(graded: Graded, rewards: np.ndarray | None) -> dict[str, np.ndarray]:
    """{metric: (problems, n)}, column k - 1 for k samples; `rewards` is (problems, n)."""
    n = graded.correct.shape[1]
    counts = graded.correct.sum(1).astype(int)
    ks = range(1, n + 1)
    curves = {
        "best-of-N": np.array([[formulas.pass_at_k(n, c, k) for k in ks] for c in counts.tolist()]),
        "unique answers": np.array([[unique_answers(row, k) for k in ks] for row in graded.answers]),
    }
    if rewards is not None:
        pairs = list(zip(graded.correct, rewards, strict=True))
        curves["chosen by reward"] = np.array([[formulas.best_of_n(*pair, k) for k in ks] for pair in pairs])
    return curves


def samples_needed(curve: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Number of samples with which `curve` reaches target[N-1], for each N; (n,), inf if n are not enough.

    Both are best-of-N rates for N = 1..n, which do not fall. `curve` is interpolated linearly; a target below
    curve[0] needs 1 sample. (DPL paper, Figure 9)
    """
    ks = np.arange(1, len(curve) + 1)
    rises = np.concatenate([[True], np.diff(curve) > 0])
    return np.interp(target, curve[rises], ks[rises], right=math.inf)


def compare(curves: dict[str, dict[str, np.ndarray]], split: np.ndarray, seed: int) -> dict[str, Any]:
    """Results of a split for every policy; {policy: {metric: list over N}}, means over its problems.

    "relative" is best-of-N divided by the first policy's (Figure 8), "needed" is samples_needed (Figure 9).
    "intervals" maps each metric but "needed" to {N: 95% bootstrap interval over problems}, N = 1, 4, 16, ...,
    n; that of "relative" is nan if a resample has no problem that the first policy solves.
    "share best": among the problems that some policy solves, the share on which this policy has the highest
    success rate of one sample (Figure 6). Ties are split equally.
    """
    rates = np.array([policy["best-of-N"][split, 0] for policy in curves.values()])  # (policies, problems)
    solved = rates[:, rates.max(0) > 0]
    wins = solved == solved.max(0) if solved.size else solved
    best = (wins / wins.sum(0)).mean(1) if solved.size else np.full(len(curves), math.nan)
    first = next(iter(curves.values()))["best-of-N"][split]

    def ratio(rows: np.ndarray) -> float:
        ours, firsts = rows.mean(0)
        return ours / firsts if firsts > 0 else math.nan

    results = {}
    for (name, policy), share in zip(curves.items(), best, strict=True):
        statistics = {metric: (values[split], np.mean) for metric, values in policy.items()}
        statistics["relative"] = (np.stack([policy["best-of-N"][split], first], 2), ratio)
        row, row_intervals = {"share best": float(share)}, {}
        for metric, (values, statistic) in statistics.items():  # values (problems, n), or (problems, n, 2)
            row[metric] = [float(statistic(column)) for column in values.swapaxes(0, 1)]
            row_intervals[metric] = {
                k: formulas.bootstrap(values[:, k - 1], statistic, seed) for k in powers(first.shape[1])
            }
        row["needed"] = samples_needed(np.array(row["best-of-N"]), first.mean(0)).tolist()
        results[name] = row | {"intervals": row_intervals}
    return results


def powers(n: int) -> list[int]:
    """1, 4, 16, ... below n, and n."""
    return [4**i for i in range(n.bit_length()) if 4**i < n] + [n]


def print_results(results: dict[str, dict[str, Any]], sizes: dict[str, int], n: int) -> None:
    """Print a table for each split: rows are policies and metrics, columns numbers of samples."""
    for split, rows in results.items():
        print(f"\n{split}: {sizes[split]} problems" + "".join(f"{f'N = {k}':>22}" for k in powers(n)))
        for name, row in rows.items():
            for metric, cells in row["intervals"].items():
                values = (
                    f"{row[metric][k - 1]:.3f} [{low:.3f}, {high:.3f}]" for k, (low, high) in cells.items()
                )
                label = name[:20] if metric == "best-of-N" else f"  {metric}"
                print(f"{label:20}" + "".join(f"{value:>22}" for value in values))
            print(f"{'  needed':20}" + "".join(f"{row['needed'][k - 1]:22.1f}" for k in powers(n)))
            if not math.isnan(row["share best"]):
                print(f"  best at {row['share best']:.0%} of the problems that any policy solves")


def draw(results: dict[str, dict[str, Any]], rates: dict[str, np.ndarray], n: int, path: str) -> None:
    """Draw the DPL paper's Figures 3 and 6 to 10; `rates` is {policy: (problems,)}, success of one sample."""
    ks, shown = np.arange(1, n + 1), next(reversed(results))
    greys = [str(0.65 * i / max(1, len(rates) - 1)) for i in range(len(rates))]
    panels = [(f"best-of-N, {split}", split, "best-of-N") for split in results]
    panels += [(f"relative to the first policy, {shown}", shown, "relative")]
    panels += [(f"samples to match the first policy, {shown}", shown, "needed")]
    panels += [("unique answers / N, all", "all", "unique answers")]
    columns = (len(panels) + 3) // 2
    figure = new_figure(4 * columns, 7)
    axes = figure.subplots(2, columns, squeeze=False).ravel()
    for axis, (title, split, metric) in zip(axes, panels, strict=False):
        for i, (name, row) in enumerate(results[split].items()):
            marks = {"marker": MARKERS[i % len(MARKERS)], "markevery": [k - 1 for k in powers(n)], "ms": 5}
            axis.plot(ks, row[metric], color=greys[i], label=name, **marks)
        axis.set_xscale("log", base=2)
        axis.set_xticks(powers(n), list(map(str, powers(n))))
        axis.set(title=title, xlabel="N, samples")
    axes[0].legend(frameon=False)
    best, places = axes[len(panels)], np.arange(len(results))
    for i, name in enumerate(rates):
        shares = [100 * rows[name]["share best"] for rows in results.values()]
        best.bar(places + 0.8 * i / len(rates), shares, 0.8 / len(rates), align="edge", color=greys[i])
    best.set_xticks(places + 0.4, list(results))
    best.set(title="highest success rate of one sample", ylabel="share of the solved problems, %")
    p, closed = np.linspace(0, 1, 200), axes[len(panels) + 1]
    for k, style in zip((1, 4, 16, 64), ("-", "--", "-.", ":"), strict=True):
        closed.plot(p, 1 - (1 - p) ** k, style, color="0.4", label=f"1 − (1 − p)^{k}")
    values = next(iter(rates.values()))
    closed.plot(values, np.zeros_like(values) - 0.04, "|", color="black", label="problems, first policy")
    closed.set(title="success against p", xlabel="p, success rate of one sample", ylabel="best-of-N")
    closed.legend(frameon=False, fontsize=8, loc="center right")
    for axis in axes[len(panels) + 2 :]:
        axis.remove()
    save_figure(figure, path)


def run(config: Config) -> None:
    """Print the metrics of every policy, by difficulty of the problems."""
    problems = read_problems(config.problems)
    paths = zip(config.names(), config.samples, strict=True)
    files = {name: match_samples(path, problems) for name, path in paths}
    base = match_samples(config.base_samples, problems) if config.base_samples else None
    indices = sorted(set.intersection(*map(set, files.values())))
    if not indices:
        raise InputError("--samples: the files have no problem in common")
    n = min(len(samples[index]) for samples in files.values() for index in indices)
    used = {name: {index: samples[index][:n] for index in indices} for name, samples in files.items()}
    rewards = dict.fromkeys(files)
    if config.reward_model:
        groups = [{str(index): some for index, some in samples.items()} for samples in used.values()]
        scores = sample_rewards(groups, config.reward_model, config.chat)
        rewards = {name: x.reshape(-1, n) for name, x in zip(files, scores, strict=True)}
    graded, unreadable = {}, {}
    for name, samples in files.items():
        if left := len(samples) - len(indices):
            print(f"warning: {name}: {left} problems are not in all files: left out", file=sys.stderr)
        if (most := max(len(samples[index]) for index in indices)) > n:
            print(f"warning: {name}: {n} of up to {most} samples per problem are used", file=sys.stderr)
        graded[name] = grade(used[name], problems, name)
        unreadable[name] = float(np.mean([key is None for row in graded[name].answers for key in row]))
        share = f"{unreadable[name]:.1%} of answers could not be read"
        print(f"{name}: {len(indices)} problems, {n} samples each, {share}")
    curves = {name: compute_curves(graded[name], rewards[name]) for name in files}
    splits = split_problems(indices, problems, base)
    results = {name: compare(curves, split, config.seed) for name, split in splits.items()}
    sizes = {name: len(split) for name, split in splits.items()}
    print_results(results, sizes, n)
    if config.out_file:
        what = {"flags": asdict(config), "problems": sizes, "samples": n, "unreadable": unreadable}
        write_json(config.out_file, what | {"results": results})
    if config.picture:
        draw(results, {name: curve["best-of-N"][:, 0] for name, curve in curves.items()}, n, config.picture)
