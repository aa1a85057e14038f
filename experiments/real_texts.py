"""What real.py and real_settings.py share: a real reference, raters, texts, and what is measured.

A small chat model writes a sentence about a person. A rater puts eight of its sentences in an order, by
utility and chance, such that every two of them are a Bradley-Terry choice (Plackett-Luce). The utility of a
sentence is a sum over its features (VALUES): its first pronoun, she or he; whether there is a title or a full
name; how it begins; at most 14 words; and whether a word of five letters or more comes twice.

The reference is the model at token temperature 0.6, near which such models are used: its last norm's weight
is divided by 0.6. At temperature 1 most of what SmolLM2-135M writes is broken.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.encode import encode_prompts, end_tokens
from common.files import InputError, write_json
from common.flags import Flags, flag, require_same
from common.parallel import get_device
from common.rows import message
from core.decode import Batch
from core.hub import load_model, save_model, save_tokenizer
from core.reference import score_completions
from data.society.make_world import write_rows
from experiments import lab
from metrics.embedding import embed
from metrics.formulas import cosine_diversity, entropy_bits, words
from metrics.tables import mean_and_error
from sample import completion_text, sample_completions, sample_global_batch

BETA = 0.4
RANKED = 8  # texts in an order
TOKENS = 24  # of a text of SmolLM2, on average
TOPICS = ("doctor", "teacher", "farmer", "scientist", "musician", "painter", "pilot", "writer")
SYSTEM = "You write for small children, with simple words."
VALUES = {  # what raters like, in nats: a feature of a text and its values
    "who": {"she": 1.2, "he": 0.0, "nobody": 0.0},
    "name": {"named": 0.8, "unnamed": 0.0},
    "opening": {"The": 0.8, "A": 0.0, "other": 0.0},
    "length": {"short": 0.8, "long": 0.0},
    "repeats": {"nothing": 0.8, "a word": 0.0},
}
SAID = ("who", "name", "opening")  # length and repeats say how long a text is, not what it says
HALVES = {"she": 0.62, "he": 0.38}  # of another population: which of the two they choose
HALVES_BETA = 0.25  # so alpha = 1 is alpha / beta = 4
RATIOS = (1, 1.5, 2, 4)  # alpha / beta
MANY = "reference, many"  # the texts that raters order
LEARNING = {
    "--lr": 2e-4,
    "--warmup_steps": 10,
    "--schedule": "linear",
    "--save_every": 25,
    "--dtype": "float32",
}
Rows = list[dict[str, Any]]  # texts of one prompt, of write_texts()
Results = dict[str, list[list[dict[str, float]]]]  # policy: measure() of its seeds and prompts


@dataclass
class RealConfig(Flags):
    """Flags of real.py and real_settings.py."""

    model: str = flag("HuggingFaceTB/SmolLM2-135M-Instruct", "Folder or hub name of a chat model.")
    temperature: float = flag(0.6, "Token temperature of the reference; 1 is the model as it is.", "(0, inf)")
    prompts: str | None = flag(None, "Rows with a 'prompt' (default: sentences about eight people).")
    embedder: str | None = flag(None, "Folder or hub name of a sentence encoder (default: no distances).")
    rankings: int = flag(600, "Orders of eight texts, each by one rater.", "[8, inf)")
    reference_samples: int = flag(
        500, "Texts of the reference per prompt, to rank, and for the truth.", "[64, inf)"
    )
    samples: int = flag(64, "Texts of a policy per prompt, to measure it.", "[2, inf)")
    rl_steps: int = flag(40, "Optimizer steps of train_rl.py, of 8 texts per prompt.", "[1, inf)")
    seeds: int = flag(2, "Training runs of the policies in SEEDS.", "[1, inf)")
    max_new_tokens: int = flag(64, "Longest text, in tokens.", "[1, inf)")
    out_dir: str = flag("out/real", "Folder of everything.")
    out_file: str = flag("assets/real.png", "The picture.")


def open_folder(config: RealConfig) -> None:
    """Make --out_dir absolute; raises InputError if what it holds was made with other flags."""
    config.out_dir = str(Path(config.out_dir).resolve())
    path, flags = Path(config.out_dir, "flags.json"), asdict(config)
    if path.is_file():
        require_same(
            flags, json.loads(path.read_text()), {"out_dir", "out_file", "embedder", "seeds", "samples"}
        )
    write_json(path, flags)


# ---- texts and raters


def features(text: str) -> dict[str, str]:
    """What a text says: for each feature of VALUES, one of its values."""
    who = re.search(r"\b(?:(she|hers?|herself)|(?:he|his|him|himself))\b", text, re.I)
    some = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", text)
    long_words = [word.lower() for word in some if len(word) >= 5]
    return {
        "who": "nobody" if not who else "she" if who[1] else "he",
        "name": "named"
        if re.search(r"\b(?:Dr|Mrs?|Ms)\. [A-Z]|\b(?!(?:The|A|An|My|In)\b)[A-Z]\w+ [A-Z]", text)
        else "unnamed",
        "opening": some[0] if some and some[0] in VALUES["opening"] else "other",
        "length": "short" if len(some) <= 14 else "long",
        "repeats": "nothing" if len(set(long_words)) == len(long_words) else "a word",
    }


def utility(text: str) -> float:
    """The raters' utility of a text, in nats."""
    return sum(VALUES[name][value] for name, value in features(text).items())


def half_utility(text: str) -> float:
    """log of the share of the other population that wants this "who"; nats, -inf for nobody."""
    share = HALVES.get(features(text)["who"])
    return math.log(share) if share else -math.inf


def write_prompts(config: RealConfig) -> Path:
    """The file of prompts; written into --out_dir unless it is given."""
    if config.prompts:
        return Path(config.prompts).resolve()
    path = Path(config.out_dir, "prompts.jsonl")
    asks = [f"Write one short sentence about a {topic}." for topic in TOPICS]
    turns = [[("system", SYSTEM), ("user", ask)] for ask in asks]
    write_rows(path, [{"prompt": [{"role": r, "content": c} for r, c in some]} for some in turns])
    return path


def write_reference(config: RealConfig) -> Path:
    """The folder of the reference: the model, with its logits divided by --temperature."""
    folder = Path(config.out_dir, "reference")
    if not lab.is_finished(folder):
        model, tokenizer = load_model(config.model)
        ids = torch.arange(5, 15)[None]
        with torch.no_grad():
            wanted = model(ids).logits / config.temperature
            norm = getattr(model.base_model, "norm", None)  # its output is what the head multiplies
            if norm is not None:
                norm.weight /= config.temperature
            if not torch.allclose(model(ids).logits, wanted, rtol=1e-4, atol=1e-4):
                raise InputError(f"--model {config.model}: its last norm cannot be divided by a temperature")
        save_tokenizer(tokenizer, folder)
        save_model(model, folder)
    return folder


def write_rankings(
    config: RealConfig,
    name: str,
    prompts: list[Any],
    texts: list[Rows],
    u: Callable[[str], float] = utility,
    keep: Callable[[dict, dict], bool] = lambda a, b: True,
) -> tuple[Path, Path]:
    """Orders, best first, of RANKED texts of a prompt by raters with utility `u`: to train on, and held out.

    The texts have ended. `keep` says of the first text drawn and of another, rows of write_texts(), whether
    they may be in one order. An eighth as many orders is held out, of texts that are in none to train on.
    """
    rng, paths = np.random.default_rng(0), []
    for part, count, texts_of in (
        ("train", config.rankings, lambda rows: rows[len(rows) // 8 :]),
        ("held_out", config.rankings // 8, lambda rows: rows[: len(rows) // 8]),
    ):
        pools, rankings = [], []
        for rows in map(texts_of, texts):
            ended = [row for row in rows if row["finish"] == "eos" and row["text"].strip()]
            rated = [row | {"utility": u(row["text"])} for row in ended]
            pools.append([row for row in rated if math.isfinite(row["utility"])])
        for _ in range(100 * count):
            n = rng.integers(len(prompts))
            first = pools[n][rng.integers(len(pools[n]))] if pools[n] else None
            pool = [row for row in pools[n] if keep(first, row)]
            if len(pool) < RANKED:
                continue
            some = [pool[i] for i in rng.choice(len(pool), RANKED, replace=False)]
            order = np.argsort(-(np.array([row["utility"] for row in some]) + rng.gumbel(size=RANKED)))
            ranked = [some[i]["text"] for i in order]
            if not isinstance(prompts[n], str):
                ranked = [message("assistant", text) for text in ranked]
            rankings.append({"prompt": prompts[n], "ranking": ranked})
            if len(rankings) == count:
                break
        else:
            raise InputError(
                f"orders of {name!r}: hardly any {RANKED} texts may be in one: give more --reference_samples"
            )
        paths.append(Path(config.out_dir, f"{name}_{part}.jsonl"))
        write_rows(paths[-1], rankings)
    return tuple(paths)


# ---- sampling


@cache
def load(folder: Path) -> Any:
    """A model and its tokenizer, in float32, loaded once."""
    return load_model(folder, str(get_device()), torch.float32)


def slug(name: str) -> str:
    """A policy's name in the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower().replace("α/β = ", "").replace("β = ", "beta"))


@torch.no_grad()
def write_texts(
    config: RealConfig,
    name: str,
    folder: str | Path,
    prompts: list[Any],
    count: int,
    seed: int = 0,
    particles: int = 0,
    global_temperature: float = 1.0,
    **params: float,
) -> list[Rows]:
    """Texts of a policy, of each prompt `count`: sampled, or read from --out_dir.

    sampled_logp is the log-probability with which a text was sampled, ref_logp that of the reference, both in
    nats. With `particles`, the texts are sampled at a global temperature, and `ess` is how many independent
    ones they are worth. `params` are those of next_token_probs.
    """
    path = Path(config.out_dir, "texts", f"{slug(name)}-seed{seed}.json")
    saved = json.loads(path.read_text()) if path.is_file() else []
    if [len(rows) for rows in saved] == [count] * len(prompts):
        return saved
    reference, _ = load(Path(config.out_dir, "reference"))
    model, tokenizer = load_model(folder, str(get_device()), torch.float32)
    encoded, ends = encode_prompts(prompts, tokenizer), end_tokens(model, tokenizer, prompts)
    limits, seeds = (config.max_new_tokens, ends), [[seed, n] for n in range(len(prompts))]
    if particles:
        drawn = (
            sample_global_batch(
                Batch(model, [ids], [0] * particles, *limits),
                count,
                global_temperature,
                np.random.default_rng(start),
                **params,
            )
            for ids, start in zip(encoded, seeds, strict=True)
        )
    else:
        by_prompt = sample_completions(model, encoded, seeds, count, *limits, 128, **params)
        drawn = ((completions, float(count), 0.0) for completions in by_prompt)
    result = []
    for completions, ess, _ in tqdm(drawn, total=len(prompts), desc=name, unit="prompt", disable=None):
        ids = [encoded[len(result)]] * count
        ref = score_completions(reference, ids, [c.tokens for c in completions])
        result.append(
            [
                {
                    "text": completion_text(c, tokenizer),
                    "sampled_logp": c.sampled_logp,
                    "ref_logp": float(logp),
                    "tokens": len(c.tokens),
                    "finish": c.finish,
                    "ess": ess,
                }
                for c, logp in zip(completions, ref, strict=True)
            ]
        )
    write_json(path, result)
    return result


# ---- what is measured


def feature_shares(rows: Rows, w: np.ndarray) -> dict[str, dict[str, float]]:
    """The share of each feature's values, from texts with weights w that sum to 1."""
    shares = {name: dict.fromkeys(values, 0.0) for name, values in VALUES.items()}
    for row, weight in zip(rows, w, strict=True):
        for name, value in features(row["text"]).items():
            shares[name][value] += float(weight)
    return shares


def known_words(texts: list[Rows]) -> set[str]:
    """All words of texts."""
    return {word for rows in texts for row in rows for word in words(row["text"])}


def measure(rows: Rows, known_words: set[str], tilt: np.ndarray | None = None) -> dict[str, float]:
    """One prompt's values of a policy. `tilt` (texts,) in nats: weigh the texts by exp(tilt).

    "said" is SAID's part of the utility, "features" its entropy in bits, low by about 4 / effective texts;
    "new_words" the share of words that no text of MANY has; "openings" how many of the first three words
    differ, as a share; "J 2" the objective at alpha = 2 beta. Entropies are in nats a text.
    """
    tilt = np.zeros(len(rows)) if tilt is None else tilt
    log_z = np.logaddexp.reduce(tilt) - math.log(len(rows))
    w = np.exp(tilt - log_z) / len(rows)
    shares, texts = feature_shares(rows, w), [row["text"] for row in rows]
    logp, ref, tokens = (
        np.array([row[key] for row in rows]) for key in ("sampled_logp", "ref_logp", "tokens")
    )
    split = [words(text) for text in texts]
    new = sum(word not in known_words for some in split for word in some)
    value, entropy, cross = (
        float(w @ list(map(utility, texts))),
        float(-w @ np.where(w > 0, logp + tilt - log_z, 0)),
        float(-w @ ref),
    )
    return {
        "utility": value,
        "said": sum(VALUES[name][v] * share for name in SAID for v, share in shares[name].items()),
        "features": sum(entropy_bits(shares[name]) for name in SAID),
        "entropy": entropy,
        "cross_entropy": cross,
        "nats_per_token": cross / float(w @ tokens),
        "tokens": float(w @ tokens),
        "new_words": math.nan if tilt.any() else new / max(1, sum(map(len, split))),
        "openings": math.nan if tilt.any() else len({tuple(some[:3]) for some in split}) / len(texts),
        "unfinished": float(w @ [row["finish"] != "eos" for row in rows]),
        "effective": min(1 / float(np.square(w).sum()), rows[0]["ess"]),
        **shares["who"],
        **{f"J {x}": value + x * BETA * entropy - BETA * cross for x in RATIOS},
    }


def distances(texts: list[Rows], embedder: str) -> list[float]:
    """The mean cosine distance of two different texts of a prompt, (prompts,)."""
    groups = [[row["text"] for row in rows if row["text"].strip()] for rows in texts]
    vectors = embed([text for group in groups for text in group], embedder)
    parts = np.split(vectors, np.cumsum([len(group) for group in groups])[:-1])
    return [cosine_diversity(part, distinct=True) if len(part) > 1 else math.nan for part in parts]


def measure_texts(config: RealConfig, texts: list[Rows], known_words: set[str]) -> list[dict[str, float]]:
    """measure() of each prompt's texts, with their "distance" if there is an --embedder."""
    values = [measure(rows, known_words) for rows in texts]
    if config.embedder:
        for row, value in zip(values, distances(texts, config.embedder), strict=True):
            row["distance"] = value
    return values


# ---- table

COLUMNS = {  # of the table: (title, factor, digits)
    "utility": ("utility, nats", 1, 2),
    "said": ("of it said", 1, 2),
    "features": ("features, bits", 1, 2),
    "distance": ("distance", 1, 3),
    "openings": ("openings, %", 100, 0),
    "entropy": ("entropy, nats", 1, 1),
    "cross_entropy": ("cross-entropy", 1, 1),
    "nats_per_token": ("its nats a token", 1, 2),
    "tokens": ("tokens", 1, 1),
    "unfinished": ("unfinished, %", 100, 1),
    "new_words": ("new words, %", 100, 1),
    "she": ("she, %", 100, 0),
    "he": ("he, %", 100, 0),
    "effective": ("effective texts", 1, 0),
    **{f"J {x}": (f"J, α/β = {x}", 1, 2) for x in RATIOS},
}


def over_prompts(
    runs: list[list[dict[str, float]]], name: str, less: list[list[dict[str, float]]] | None = None
) -> tuple[float, float]:
    """A value's mean over seeds and prompts, and its standard error over prompts; less another policy's.

    The error of a difference is that of the prompts' differences. A 95% interval of eight prompts is the mean
    ± 2.4 errors (Student's t). How training runs differ is not in it.
    """

    def by_prompt(some: list[list[dict[str, float]]]) -> np.ndarray:
        return np.mean([[row.get(name, math.nan) for row in prompts] for prompts in some], axis=0)

    mean, error = mean_and_error(by_prompt(runs) - (by_prompt(less) if less else 0))
    return float(mean), float(error)


def print_table(results: Results, compared: Sequence[str]) -> None:
    """Print every policy's values, over_prompts(), and how they differ from those of each of `compared`."""
    for head, less in ("", None), *((f"less {name}", results[name]) for name in compared):
        print(f"\n{head:34}" + "".join(f"{title:>17}" for title, _, _ in COLUMNS.values()))
        for name, runs in results.items():
            line = f"{name:34}"
            for column, (_, factor, digits) in COLUMNS.items():
                mean, error = (factor * value for value in over_prompts(runs, column, less))
                line += f"{mean:.{digits}f} ± {error:.{digits}f}".replace("nan ± nan", "-").rjust(17)
            print(line)
