"""Evaluate models and the files that sample.py wrote. Each subcommand prints a table and can write JSON.

    society     the embedded world's samples against its exact optimum (DPL paper, equation 35)
    diversity   how different the samples of a prompt are, by embeddings and by n-grams
    quality     reward under a reward model, and cross-entropy to the reference policy
    judge       diversity as a language model rates it (DPL paper, B.1)
    winrate     one policy's samples against another's (MallowsPO paper, C.3.1)
    answers     best-of-N on problems with a right answer (DPL paper, 4.2; best_of_n.py)
    choices     calibration on multiple choice (DPL paper, 4.3; choices.py)

diversity, quality, judge and winrate compute a metric for each prompt, from that prompt's samples, and print
its mean over prompts with a 95% bootstrap interval. The interval is over prompts: samples of one prompt are
not independent. --baseline adds the samples of another policy, such as the reference. For diversity, quality
and judge, the table then has the difference too, taken prompt by prompt. Its interval is often narrower
than that of either mean.

    python evaluate.py society
    python evaluate.py diversity --samples dpl.jsonl --baseline dpo.jsonl --embedder ENCODER
    python evaluate.py quality --samples dpl.jsonl --baseline dpo.jsonl --reward_model out/reward
    python evaluate.py judge --samples dpl.jsonl --endpoint http://localhost:8000/v1 --judge_model NAME
    python evaluate.py winrate --samples dpl.jsonl --baseline dpo.jsonl --reward_model out/reward
    python evaluate.py answers --problems gsm8k.jsonl --samples dpo.jsonl dpl.jsonl
    python evaluate.py choices --questions mmlu.jsonl --models out/dpo out/dpl
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import metrics
from best_of_n import AnswersConfig, answers
from checks import check_packable
from choices import ChoicesConfig, choices
from data.society.truth import compare_samples, print_comparison
from embedding import embed
from encode import encode_answers, encode_prompts
from files import InputError, error_prefix, flag, parse, read_rows, require, run_command, write_json
from formats import last_turn, read_sample, to_texts, transcript
from hub import load_model
from judge import (
    DIVERSITY,
    JudgeConfig,
    compare,
    count_calls,
    fetch_embeddings,
    pair_prompts,
    pool_prompts,
    rate_pools,
)
from parallel import get_device, get_dtype
from reference import score_completions
from tables import (
    Columns,
    SamplesConfig,
    equally_many,
    first_samples,
    flatten,
    prompt_means,
    read_files,
    report_means,
    sample_rewards,
    split,
    texts_by_prompt,
)

WORLD = Path(__file__).parent / "data/society/world.json"
ORDERS = (1, 2)  # n of the n-grams


@dataclass
class SocietyConfig:
    """Flags of evaluate.py society."""

    samples: str = flag("out/dpl/samples.jsonl", "File that sample.py wrote.")
    alpha: float = flag(0.2, "The policy was trained with this alpha.")
    beta: float = flag(0.1, "The policy was trained with this beta.")
    out_file: str | None = flag(None, "Also write all results to this file, as JSON.")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a positive number")


def society(config: SocietyConfig) -> None:
    """Compare samples of the embedded world with the best policy for alpha and beta, slot by slot.

    The defaults continue from those of train_dpl.py and sample.py.
    """
    samples = [read_sample(row, where) for where, row in read_rows(config.samples)]
    pairs = [(last_turn(sample.prompt), sample.text) for sample in samples]
    result = compare_samples(pairs, json.loads(WORLD.read_bytes()), config.alpha, config.beta)
    print_comparison(result)
    if config.out_file:
        write_json(config.out_file, result)


# ---- diversity


@dataclass
class DiversityConfig(SamplesConfig):
    """Flags of evaluate.py diversity."""

    embedder: str | None = flag(None, "Sentence encoder: folder, hub name, or its name at --embeddings_url.")
    embeddings_url: str | None = flag(None, "OpenAI-compatible endpoint that computes the embeddings.")
    api_key_env: str = flag("OPENAI_API_KEY", "Environment variable with that endpoint's key.")
    budget: int = flag(20, "Words of each text that the second set of lexical metrics sees.")
    reward_model: str | None = flag(None, "Also measure the good samples alone, by this model's reward.")
    reward_threshold: float | None = flag(None, "Lowest good reward (default: the median over --baseline).")

    def __post_init__(self) -> None:
        has_threshold = self.baseline is not None or self.reward_threshold is not None
        for name, condition, wanted in (
            ("budget", self.budget >= max(ORDERS), f"at least {max(ORDERS)}"),
            ("embeddings_url", not self.embeddings_url or self.embedder, "given with --embedder, its model"),
            (
                "reward_model",
                not self.reward_model or has_threshold,
                "given with --baseline or --reward_threshold",
            ),
        ):
            require(self, name, condition, wanted)


def lexical_metrics(texts: Sequence[str], vocabulary: dict[int, int]) -> dict[str, float]:
    """Metrics of the words of one prompt's texts; vocabulary[n] is the number of different n-grams."""
    result = {
        "unique texts": metrics.unique_share(texts),
        "self-BLEU (high: alike)": metrics.self_bleu(texts),
    }
    for n in ORDERS:
        result[f"distinct-{n}"] = metrics.distinct_n(texts, n)
        result[f"EAD-{n}"] = metrics.ead(texts, n, vocabulary[n])
    return result | {"words per text": float(np.mean([len(metrics.words(text)) for text in texts]))}


def diversity(config: DiversityConfig) -> None:
    """How different the samples of a prompt are: by embeddings (DPL paper, equation 44) and by n-grams.

    Word metrics favour short texts, so each is computed twice: on whole texts, and on their first --budget
    words. All metrics favour nonsense, so --reward_model adds all of them for the good samples alone. Most
    change with the number of samples, so both files are compared by the first samples of a prompt, equally
    many. EAD's vocabulary is the number of different n-grams in all texts.

    Each text is embedded as the package sentence-transformers would: its pooling, its layers, its truncation,
    and its prompt only if the encoder has a default one.
    """
    files = equally_many(config, read_files(config))
    if max(map(len, files[0].values())) < 2:
        also = f", in {config.baseline} too" if config.baseline else ""
        raise InputError(f"{config.samples}: diversity needs two samples of a prompt{also}; see sample.py")
    texts = [texts_by_prompt(groups) for groups in files]
    every = sorted({text for groups in texts for group in groups for text in group})
    index = {text: i for i, text in enumerate(every)}
    # at least 1: texts of one word have no pairs of words
    vocabulary = {n: max(1, len(metrics.count_ngrams(every, n))) for n in ORDERS}
    embeddings = None
    if config.embeddings_url:
        options = {"api_key_env": config.api_key_env, "timeout": 60.0, "retries": 5}
        embeddings = fetch_embeddings(every, config.embeddings_url, config.embedder, **options)
    elif config.embedder:
        embeddings = embed(every, config.embedder)
    if embeddings is not None:
        norms = np.linalg.norm(embeddings, axis=1)
        if bad := [text for text, norm in zip(every, norms, strict=True) if not 0 < norm < math.inf]:
            what = f"the vector of {bad[0][:60]!r} (and of {len(bad) - 1:,} more texts)"
            raise InputError(f"--embedder {config.embedder}: {what} is zero or not finite")

    def of_prompt(group: list[str]) -> dict[str, float]:
        result = {}
        if embeddings is not None:
            vectors = embeddings[[index[text] for text in group]]
            result["cosine distance, eq. 44"] = metrics.cosine_diversity(vectors)
            result["cosine distance, i != j"] = metrics.cosine_diversity(vectors, distinct=True)
            result["Vendi score"] = metrics.vendi_score(vectors)
        cut = lexical_metrics([metrics.cut_words(text, config.budget) for text in group], vocabulary)
        short = {f"{name}, {config.budget} words": value for name, value in cut.items()}
        return result | lexical_metrics(group, vocabulary) | short

    def of_file(groups: list[list[str]], suffix: str = "") -> Columns:
        rows = [of_prompt(group) if len(group) > 1 else {} for group in groups]
        names = max(rows, key=len)
        return {name + suffix: np.array([row.get(name, math.nan) for row in rows]) for name in names}

    columns = [of_file(groups) for groups in texts]
    if config.reward_model:
        rewards = sample_rewards(files, config.reward_model, config.chat)
        least = config.reward_threshold
        least = float(np.median(rewards[1])) if least is None else least
        print(f"good samples: reward at least {least:.4g}")
        good = []
        for column, groups, reward in zip(columns, files, rewards, strict=True):
            parts = zip(groups.values(), split(reward, groups), strict=True)
            good.append([[s.text for s, r in zip(*part, strict=True) if r >= least] for part in parts])
            column["share of good samples"] = prompt_means(reward >= least, groups)
        for column, groups in zip(columns, first_samples(good), strict=True):
            column |= of_file(groups, " | good")
    report_means(config, columns, files)


# ---- quality


@dataclass
class QualityConfig(SamplesConfig):
    """Flags of evaluate.py quality."""

    reward_model: str | None = flag(None, "Folder or hub name of a sequence classifier with one label.")
    reference: str | None = flag(None, "Folder or hub name of the reference policy.")

    def __post_init__(self) -> None:
        require(self, "reference", self.reference or self.reward_model, "given, or --reward_model, or both")


def quality(config: QualityConfig) -> None:
    """Mean reward, and cross-entropy to the reference: -log pi_ref in nats per text and per token.

    The end token counts, except of a text that sample.py cut before it.
    """
    files = read_files(config)
    columns: list[Columns] = [{} for _ in files]
    if config.reward_model:
        rewards = sample_rewards(files, config.reward_model, config.chat)
        for column, groups, reward in zip(columns, files, rewards, strict=True):
            column["reward"] = prompt_means(reward, groups)
    if config.reference:
        with error_prefix("--reference"):
            model, tokenizer = load_model(config.reference, str(get_device()), get_dtype())
            check_packable(model, config.reference)
            for column, groups in zip(columns, files, strict=True):
                samples = flatten(groups)
                prompts, answers, options = to_texts(samples, config.chat)
                answers = encode_answers(prompts, answers, tokenizer, options)
                encoded = encode_prompts(prompts, tokenizer, options), answers
                for sample, ids in zip(samples, encoded[1], strict=True):
                    if sample.finish in ("length", "stop") and len(ids) > 1:
                        ids.pop()
                nats = prompt_means(-score_completions(model, *encoded), groups)
                tokens = prompt_means([len(ids) for ids in encoded[1]], groups)
                column["cross-entropy, nats per text"] = nats
                column["cross-entropy, nats per token"] = nats / tokens
                column["tokens per text"] = tokens
    report_means(config, columns, files)


# ---- judged diversity, win rate


@dataclass
class JudgedConfig(JudgeConfig, SamplesConfig):
    """Flags of evaluate.py judge."""


def judge(config: JudgedConfig) -> None:
    """Diversity of pools of samples, as a language model rates it (DPL paper, B.1).

    logical: 5 - the agreement of two samples, 0 to 4. content, surface_form, perspective: the diversity of
    four samples, 1 to 5. Raises InputError if a prompt has too few samples.
    """
    files = read_files(config)
    prompts = [transcript(group[0].prompt) for group in files[0].values()]
    texts = [texts_by_prompt(groups) for groups in files]
    least, pool = min(len(group) for groups in texts for group in groups), max(DIVERSITY.values())
    if least < pool:
        raise InputError(
            f"{config.samples}: a prompt has {least} samples, and the judge rates {pool} at a time"
        )
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


@dataclass
class WinRateConfig(JudgedConfig):
    """Flags of evaluate.py winrate."""

    reward_model: str | None = flag(None, "Compare by this model's rewards; no endpoint is then asked.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "baseline", self.baseline is not None, "given: the samples to compare with")


def winrate(config: WinRateConfig) -> None:
    """How often the samples win against --baseline: wins plus half the ties (MallowsPO paper, C.3.1).

    A prompt's first sample meets the baseline's first, its second the second, and so on.
    """
    groups, others = read_files(config)
    both = zip(groups.items(), others.values(), strict=True)
    pairs = {prompt: list(zip(ours, theirs, strict=False)) for (prompt, ours), theirs in both}
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
        score, longer = metrics.pair_score(*verdicts), len(a.text) - len(b.text)
        longer_wins = (score == 1) == (longer > 0) if score != 0.5 and longer else math.nan
        rows.append([score, score == 0.5, {*verdicts} == {"A", "B"}, longer_wins, 0.0])
    values = zip((*names, "verdict missing"), zip(*rows, strict=True), strict=True)
    report_means(config, [{name: prompt_means(x, pairs) for name, x in values}], [groups, others])


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "society": (SocietyConfig, society),
    "diversity": (DiversityConfig, diversity),
    "quality": (QualityConfig, quality),
    "judge": (JudgedConfig, judge),
    "winrate": (WinRateConfig, winrate),
    "answers": (AnswersConfig, answers),
    "choices": (ChoicesConfig, choices),
}


def main() -> None:
    """Run the subcommand that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise InputError(f"evaluate.py {name}: no such subcommand; give one of {', '.join(COMMANDS)}")
    config, run = COMMANDS[name]
    run(parse(config, run.__doc__, sys.argv[2:]))


if __name__ == "__main__":
    run_command(main)
