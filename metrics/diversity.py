"""How different the samples of a prompt are: by embeddings (DPL paper, equation 44) and by n-grams.

Word metrics favour short texts, so each is computed twice: on whole texts, and on their first --budget
words. All metrics favour nonsense, so --reward_model adds all of them for the good samples alone. Most
change with the number of samples, so both files are compared by the first samples of a prompt, equally
many. EAD's vocabulary is the number of different n-grams in all texts.

Each text is embedded as the package sentence-transformers would: its pooling, its layers, its truncation,
and its prompt only if the encoder has a default one.

    python evaluate.py diversity --samples dpl.jsonl --baseline dpo.jsonl --embedder ENCODER
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.files import InputError
from common.flags import flag, require
from metrics import formulas
from metrics.embedding import embed
from metrics.endpoint import fetch_embeddings
from metrics.tables import (
    Columns,
    SamplesConfig,
    equally_many,
    first_samples,
    prompt_means,
    read_files,
    report_means,
    sample_rewards,
    split,
    texts_by_prompt,
)

ORDERS = (1, 2)  # n of the n-grams


@dataclass
class Config(SamplesConfig):
    """Flags of evaluate.py diversity."""

    embedder: str | None = flag(None, "Sentence encoder: folder, hub name, or its name at --embeddings_url.")
    embeddings_url: str | None = flag(None, "OpenAI-compatible endpoint that computes the embeddings.")
    api_key_env: str = flag("OPENAI_API_KEY", "Environment variable with that endpoint's key.")
    budget: int = flag(20, "Words of each text that the second set of lexical metrics sees.", "[2, inf)")
    reward_model: str | None = flag(None, "Also measure the good samples alone, by this model's reward.")
    reward_threshold: float | None = flag(None, "Lowest good reward (default: the median over --baseline).")

    def __post_init__(self) -> None:
        has_threshold = self.baseline is not None or self.reward_threshold is not None
        super().__post_init__()
        has_model = not self.embeddings_url or self.embedder
        require(self, "embeddings_url", has_model, "given with --embedder, its model")
        can_tell = not self.reward_model or has_threshold
        require(self, "reward_model", can_tell, "given with --baseline or --reward_threshold")


def lexical_metrics(texts: Sequence[str], vocabulary: dict[int, int]) -> dict[str, float]:
    """Metrics of the words of one prompt's texts; vocabulary[n] is the number of different n-grams."""
    result = {
        "unique texts": formulas.unique_share(texts),
        "self-BLEU (high: alike)": formulas.self_bleu(texts),
    }
    for n in ORDERS:
        result[f"distinct-{n}"] = formulas.distinct_n(texts, n)
        result[f"EAD-{n}"] = formulas.ead(texts, n, vocabulary[n])
    return result | {"words per text": float(np.mean([len(formulas.words(text)) for text in texts]))}


def run(config: Config) -> None:
    """Print, for each metric, its mean over prompts, and the difference to --baseline."""
    files = equally_many(config, read_files(config))
    if max(map(len, files[0].values())) < 2:
        also = f", in {config.baseline} too" if config.baseline else ""
        raise InputError(f"{config.samples}: diversity needs two samples of a prompt{also}; see sample.py")
    texts = [texts_by_prompt(groups) for groups in files]
    every = sorted({text for groups in texts for group in groups for text in group})
    index = {text: i for i, text in enumerate(every)}
    # at least 1: texts of one word have no pairs of words
    vocabulary = {n: max(1, len(formulas.count_ngrams(every, n))) for n in ORDERS}
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
            result["cosine distance, eq. 44"] = formulas.cosine_diversity(vectors)
            result["cosine distance, i != j"] = formulas.cosine_diversity(vectors, distinct=True)
            result["Vendi score"] = formulas.vendi_score(vectors)
        cut = lexical_metrics([formulas.cut_words(text, config.budget) for text in group], vocabulary)
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
