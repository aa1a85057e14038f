"""Diversity as a language model rates it, from 1 to 5 (DPL paper, section B.1).

The samples of a prompt are split into pools: of two for "logical", of four for the other metrics.

    logical                              5 - the agreement of the two samples, so 0 to 4
    content, surface_form, perspective   how much the four samples differ, 1 to 5

The questions are text files in data/judge; endpoint.py says how they are asked.

    python evaluate.py judge --samples dpl.jsonl --endpoint http://localhost:8000/v1 --judge_model NAME
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.files import InputError, fill
from common.rows import transcript
from metrics.endpoint import EndpointConfig, Texts, ask, count_calls, read_judge_prompt
from metrics.equality import after_thinking
from metrics.tables import Columns, SamplesConfig, read_files, report_means, texts_by_prompt

DIVERSITY = {"logical": 2, "content": 4, "surface_form": 4, "perspective": 4}  # metric: samples per pool
# not "Rating: 3-4", "Rating: 7/10" or "Rating: 1,5"
RATING = re.compile(
    r"(?i)(?<![^\W_])rating[*_`]*\s*[:=][\s*_`]*([+-]?\d+(?:\.\d+)?)"
    r"(?![.,]?\d|[^\W_]|[ \t]*(?:[-–—]|to|or)[ \t]*\d|[*_` \t]*(?:/|out of)(?!\s*5(?![.,]?\d)))"
)


def rating(text: str) -> float | None:
    """X of the first readable "Rating: X" after_thinking(); None if there is none or X is not in 1..5.

    The first, because the rating comes before its explanation (DPL paper, section B.1). "X/5" is read as X.
    """
    match = RATING.search(after_thinking(text))
    return float(match[1]) if match and 1 <= float(match[1]) <= 5 else None


def pool_prompts(
    prompts: Texts, groups: Sequence[Texts], config: EndpointConfig
) -> list[tuple[str, int, str]]:
    """(metric, prompt index, question) of each pool of consecutive samples; groups[i] belongs to prompts[i].

    DIVERSITY gives the pool sizes. Samples that do not fill a last pool are left out.
    """
    questions = []
    for metric, size in DIVERSITY.items():
        template = read_judge_prompt(config, metric, "prompt", "responses")
        for index, (prompt, samples) in enumerate(zip(prompts, groups, strict=True)):
            for start in range(0, len(samples) - size + 1, size):
                pool = enumerate(samples[start : start + size], 1)
                responses = "\n\n".join(f"<response {n}>\n{text}\n</response {n}>" for n, text in pool)
                questions.append((metric, index, fill(template, prompt=prompt, responses=responses)))
    return questions


def rate_pools(prompts: Texts, groups: list[Texts], config: EndpointConfig) -> tuple[dict, dict]:
    """Rate the diversity of each prompt's samples; groups[i] belongs to prompts[i] (DPL paper, section B.1).

    Returns ratings and counts. ratings[metric][i] holds the ratings of that prompt's pools, missing ones left
    out: 1 to 5, larger is more diverse; "logical" is 5 - rating of agreement, so 0 to 4. counts[metric] holds
    the numbers of pools "asked" and "missing".
    """
    questions = pool_prompts(prompts, groups, config)
    answers = ask([question for _, _, question in questions], rating, config, "diversity")
    ratings = {metric: [[] for _ in prompts] for metric in DIVERSITY}
    counts = {metric: {"asked": 0, "missing": 0} for metric in DIVERSITY}
    for (metric, index, _), answer in zip(questions, answers, strict=True):
        counts[metric]["asked"] += 1
        counts[metric]["missing"] += answer is None
        if answer is not None:
            ratings[metric][index].append(5 - answer if metric == "logical" else answer)
    return ratings, counts


@dataclass
class Config(EndpointConfig, SamplesConfig):
    """Flags of evaluate.py judge."""


def run(config: Config) -> None:
    """Print the mean ratings over prompts. Raises InputError if a prompt has too few samples."""
    files = read_files(config)
    prompts = [transcript(group[0].prompt) for group in files[0].values()]
    texts = [texts_by_prompt(groups) for groups in files]
    pool = max(DIVERSITY.values())
    for path, groups in zip((config.samples, config.baseline), texts, strict=False):
        least = min(map(len, groups))
        if least < pool:
            raise InputError(f"{path}: a prompt has {least} samples, and the judge rates {pool} at a time")
    if config.dry_run:
        questions = [q for groups in texts for *_, q in pool_prompts(prompts, groups, config)]
        print(f"{count_calls(questions, config):,} requests would be sent")
        return
    columns: list[Columns] = []
    for groups in texts:
        ratings, counts = rate_pools(prompts, groups, config)
        columns.append({k: np.array([np.mean(r) if r else math.nan for r in v]) for k, v in ratings.items()})
        print(", ".join(f"{k}: {v['missing']} of {v['asked']} ratings missing" for k, v in counts.items()))
    report_means(config, columns, files)
