"""How often the samples win against --baseline: wins plus half the ties (MallowsPO paper, section C.3.1).

A prompt's first sample meets the baseline's first, its second the second, and so on. A reward model decides,
or a judge, who is asked twice, the second time with the answers swapped, since judges favour a position.

    python evaluate.py winrate --samples dpl.jsonl --baseline dpo.jsonl --reward_model out/reward
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from common.files import fill
from common.flags import flag, require
from common.rows import transcript
from metrics import formulas, judge
from metrics.endpoint import EndpointConfig, Texts, ask, count_calls, read_judge_prompt
from metrics.equality import after_thinking
from metrics.tables import equally_many, prompt_means, read_files, report_means, sample_rewards

SWAPPED = {"A": "B", "B": "A", "tie": "tie", None: None}


def verdict(text: str) -> str | None:
    """Return "A", "B" or "tie" for the last [[A]], [[B]] or [[C]] after_thinking(); None if there is none."""
    matches = re.findall(r"\[\[([ABC])\]\]", after_thinking(text))
    return {"A": "A", "B": "B", "C": "tie"}[matches[-1]] if matches else None


def pair_prompts(prompts: Texts, first: Texts, second: Texts, config: EndpointConfig) -> list[str]:
    """The questions of compare(): all with `first` as answer A, then all with `second` as answer A."""
    template = read_judge_prompt(config, "pairwise", "prompt", "answer_a", "answer_b")
    return [
        fill(template, prompt=prompt, answer_a=a, answer_b=b)
        for answers in ((first, second), (second, first))
        for prompt, a, b in zip(prompts, *answers, strict=True)
    ]


def compare(prompts: Texts, first: Texts, second: Texts, config: EndpointConfig) -> tuple[list, list]:
    """Compare two answers to each prompt, in both orders (MallowsPO paper, section C.3.1).

    Returns the verdicts with `first` shown first, and those with `second` shown first. In both lists "A"
    means that `first` is better, "B" that `second` is, and None that the answer is missing.
    """
    answers = ask(pair_prompts(prompts, first, second, config), verdict, config, "comparison")
    return answers[: len(prompts)], [SWAPPED[answer] for answer in answers[len(prompts) :]]


@dataclass
class Config(judge.Config):
    """Flags of evaluate.py winrate."""

    reward_model: str | None = flag(None, "Compare by this model's rewards; no endpoint is then asked.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "baseline", self.baseline is not None, "given: the samples to compare with")


def run(config: Config) -> None:
    """Print the win rate, and what it hides: ties, verdicts that flip, the share of longer winners."""
    groups, others = equally_many(config, read_files(config))
    both = zip(groups.items(), others.values(), strict=True)
    pairs = {prompt: list(zip(ours, theirs, strict=True)) for (prompt, ours), theirs in both}
    ours, theirs = ([pair[side] for group in pairs.values() for pair in group] for side in (0, 1))
    if config.reward_model:
        sides = [{"": ours}, {"": theirs}]
        margin = np.subtract(*sample_rewards(sides, config.reward_model, config.chat))
        first = swapped = np.where(margin > 0, "A", np.where(margin < 0, "B", "tie")).tolist()
    else:
        texts = [transcript(s.prompt) for s in ours], [s.text for s in ours], [s.text for s in theirs]
        if config.dry_run:
            print(f"{count_calls(pair_prompts(*texts, config), config):,} requests would be sent")
            return
        first, swapped = compare(*texts, config)
    names = ("win rate", "ties", "verdict flips with the order", "longer text wins, if one wins")
    rows = []
    for a, b, *verdicts in zip(ours, theirs, first, swapped, strict=True):
        if None in verdicts:
            rows.append([math.nan] * 4 + [1.0])
            continue
        score, longer = formulas.pair_score(*verdicts), len(a.text) - len(b.text)
        longer_wins = (score == 1) == (longer > 0) if score != 0.5 and longer else math.nan
        rows.append([score, score == 0.5, {*verdicts} == {"A", "B"}, longer_wins, 0.0])
    values = zip((*names, "verdict missing"), zip(*rows, strict=True), strict=True)
    report_means(config, [{name: prompt_means(x, pairs) for name, x in values}], [groups, others])
