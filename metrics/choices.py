"""evaluate.py choices: accuracy and calibration on multiple choice (DPL paper, section 4.3 and appendix D).

The policy is asked to begin its reply with the letter of its choice. The probability of an option is that of
its letter, normalised over the options:

    p_k  =  pi(letter k | question) / sum_j pi(letter j | question)

A letter is scored as a whole continuation. After a plain prompt it is " A", which may be two tokens; after a
chat template it is "A". The question is computed once for all its options.

    confidence  the largest p_k. A policy is calibrated if 70% of its choices with confidence 70% are right
    ECE         mean distance of confidence and accuracy, in ten bins (lo, hi] of equal width or equal mass
    Brier       mean of sum_k (p_k - [k is right])^2, 0 to 2
    NLL         mean of -log p of the right option, nats

Questions are rows of MMLU as on the hub (question, choices, answer: index or letter), or TruthfulQA's csv.
TruthfulQA: the best answer and up to three incorrect ones (one with --binary), in shuffled order, so that a
policy that always says "A" gains nothing.

    python evaluate.py choices --questions mmlu.jsonl --models REFERENCE out/dpo out/dpl --picture mmlu.png
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from common.encode import answer_lead, encode_answers, encode_prompts
from common.files import InputError, error_prefix, fill, read_template, write_json
from common.flags import Flags, flag, require
from common.parallel import get_device, get_dtype
from common.rows import message, read_rows
from core.checks import check_packable
from core.hub import load_model
from core.reference import score_completions
from metrics import formulas
from metrics.tables import check_outputs, new_figure, save_figure

LETTERS = "ABCDEFGHIJ"
BINS = 10


@dataclass
class Config(Flags):
    """Flags of evaluate.py choices."""

    questions: str | None = flag(
        None, "MMLU's rows, TruthfulQA's .csv, or rows of question, choices, answer."
    )
    models: list[str] | None = flag(None, "Folders or hub names of the policies to compare.")
    limit: int = flag(0, "Evaluate this many questions, chosen at random by --seed; 0 means all.", "[0, inf)")
    binary: bool = flag(False, "TruthfulQA: the best answer against one incorrect answer.")
    chat: bool = flag(False, "Put the questions through the chat template.")
    template: str = flag("data/prompts/choices.txt", "File with {question} and {options}.")
    out_file: str | None = flag(None, "Also write all results to this file, as JSON.")
    picture: str | None = flag(None, "Also draw the reliability diagrams into this file, .png or .pdf.")
    overwrite: bool = flag(False, "Replace --out_file and --picture.")
    seed: int = flag(0, "Seed of the choice of questions, of the options' order and of the bootstrap.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "questions", self.questions is not None, "given")
        require(self, "models", bool(self.models), "given: one or more")
        check_outputs(self)


class Question(NamedTuple):
    """A question, its options, and which of them is right, counted from 0."""

    text: str
    options: list[str]
    right: int


def read_questions(path: str, binary: bool, seed: int) -> list[Question]:
    """Questions of a file. Raises InputError naming the row that cannot be read."""
    return [
        read_choices(row, where, binary, random.Random(f"{seed} {number}"))
        for number, (where, row) in enumerate(read_rows(path), 1)
    ]


def read_choices(row: dict[str, Any], where: str, binary: bool, rng: random.Random) -> Question:
    """The question of a row; `rng` shuffles TruthfulQA's options. Raises InputError with `where`."""
    if "Best Answer" in row:  # TruthfulQA
        text, best = (str(row.get(key) or "").strip() for key in ("Question", "Best Answer"))
        parts = map(str.strip, str(row.get("Incorrect Answers") or "").split(";"))
        wrong = list(dict.fromkeys(filter(None, parts)))  # some rows repeat one
        if binary and row.get("Best Incorrect Answer"):  # newer versions of the file have it
            wrong = [str(row["Best Incorrect Answer"]).strip()]
        if not (text and best and wrong):
            raise InputError(f"{where}: needs a 'Question', a 'Best Answer' and 'Incorrect Answers'")
        options = [best, *rng.sample(wrong, min(1 if binary else 3, len(wrong)))]
        rng.shuffle(options)
        right = options.index(best)
    elif binary:
        raise InputError(f"{where}: --binary is for TruthfulQA's rows, and this one has no 'Best Answer'")
    else:
        text, options, right = row.get("question"), row.get("choices"), row.get("answer")
        if isinstance(right, str) and len(right.strip()) == 1:
            right = LETTERS.find(right.strip().upper())
    strings = isinstance(text, str) and isinstance(options, list) and all(isinstance(x, str) for x in options)
    if not (strings and 2 <= len(options) <= len(LETTERS)):
        raise InputError(f"{where}: needs a 'question' and 2 to {len(LETTERS)} 'choices', strings")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise InputError(f"{where}: 'answer' must be the index or the letter of one of the choices")
    return Question(text, options, right)


def choice_probs(
    model: Any, tokenizer: Any, questions: list[Question], template: str, chat: bool
) -> list[np.ndarray]:
    """Probabilities of each question's options, (options,). Raises InputError if a question is too long."""
    prompts, letters = [], []
    for question in questions:
        options = "\n".join(f"{x}. {option}" for x, option in zip(LETTERS, question.options, strict=False))
        text = fill(template, question=question.text, options=options)
        prompts.append(message("user", text) if chat else text)
        letters.append(LETTERS[: len(question.options)])
    encoded = encode_prompts(prompts, tokenizer)
    # what the template writes before an answer comes before the letter: a space, or an empty <think></think>
    lead = answer_lead(prompts[0], tokenizer) if chat else " "
    continuations = encode_answers(
        [prompts[0]] * len(LETTERS), [lead + letter for letter in LETTERS], tokenizer
    )
    ids = {letter: ids[:-1] for letter, ids in zip(LETTERS, continuations, strict=True)}  # no end token
    rows = [(prompt, ids[x]) for prompt, own in zip(encoded, letters, strict=True) for x in own]
    logp = score_completions(model, *zip(*rows, strict=True), max_tokens=2048)
    parts = np.split(logp, np.cumsum([len(own) for own in letters])[:-1])
    return [torch.from_numpy(part).softmax(0).numpy() for part in parts]


def calibration(probs: list[np.ndarray], right: list[int]) -> dict[str, np.ndarray]:
    """Per question: confidence, accuracy (1 if the likeliest option is right), brier, nll; (questions,)."""
    return {
        "confidence": np.array([p.max() for p in probs]),
        "accuracy": np.array([float(p.argmax() == k) for p, k in zip(probs, right, strict=True)]),
        "brier": np.array(
            [formulas.brier_score(p[None], np.array([k])) for p, k in zip(probs, right, strict=True)]
        ),
        "nll": np.array([-math.log(max(p[k], 1e-300)) for p, k in zip(probs, right, strict=True)]),
    }


def summarize(values: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """{metric: {"mean", "low", "high"}} with 95% bootstrap intervals over questions.

    A resample adds its own sampling noise to the bins, which raises its ECE above that of the data. ECE
    therefore gets the basic bootstrap interval, [2 ECE - q_97.5%, 2 ECE - q_2.5%], cut off at 0.
    """
    pairs = np.stack([values["confidence"], values["accuracy"]], 1)

    def ece(rows: np.ndarray, equal_mass: bool = False) -> float:
        return formulas.expected_calibration_error(*rows.T, BINS, equal_mass)

    statistics = {
        "accuracy": (values["accuracy"], np.mean),
        "confidence": (values["confidence"], np.mean),
        "ECE, equal width": (pairs, ece),
        "ECE, equal mass": (pairs, lambda rows: ece(rows, True)),
        "Brier, 0 to 2": (values["brier"], np.mean),
        "NLL, nats": (values["nll"], np.mean),
    }
    result = {}
    for name, (rows, statistic) in statistics.items():
        mean, (low, high) = float(statistic(rows)), formulas.bootstrap(rows, statistic, seed, 1000)
        if statistic is not np.mean:
            low, high = (max(2 * mean - x, 0.0) for x in (high, low))  # a NaN stays one
        result[name] = {"mean": mean, "low": low, "high": high}
    return result


def draw(tables: dict[str, dict[str, np.ndarray]], path: str) -> None:
    """Draw a reliability diagram per model: accuracy against confidence, and how many questions a bin has."""
    figure = new_figure(3.6 * len(tables), 3.8)
    for axis, (name, values) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
    ):
        edges = formulas.calibration_edges(values["confidence"], BINS)
        count, confidence, accuracy = formulas.reliability(values["confidence"], values["accuracy"], edges).T
        axis.bar(
            edges[:-1], count / count.sum(), 1 / BINS, align="edge", color="0.88", label="share of questions"
        )
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, label="calibrated")
        error = np.sqrt(accuracy * (1 - accuracy) / np.maximum(count, 1))
        axis.errorbar(
            confidence, accuracy, error, fmt="o-", color="black", ms=4, capsize=2, label="accuracy ± 1 se"
        )
        axis.set(title=name, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def run(config: Config) -> None:
    """Print accuracy and calibration of policies, with 95% intervals over questions."""
    questions = read_questions(config.questions, config.binary, config.seed)
    if 0 < config.limit < len(questions):
        questions = random.Random(config.seed).sample(questions, config.limit)
    template = read_template(config.template, "question", "options")
    right, tables, results = [question.right for question in questions], {}, {}
    for path in config.models:
        model, tokenizer = load_model(path, str(get_device()), get_dtype())
        check_packable(model, path)
        with error_prefix(config.questions):
            probs = choice_probs(model, tokenizer, questions, template, config.chat)
        tables[path] = calibration(probs, right)
        results[path] = summarize(tables[path], config.seed)
        del model
    title = f"{len(questions):,} questions"
    print(f"{title:28}" + "".join(f"{name[-26:]:>28}" for name in tables))
    for metric in next(iter(results.values())):
        cells = ("{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row[metric]) for row in results.values())
        print(f"{metric:28}" + "".join(f"{cell:>28}" for cell in cells))
    if config.out_file:
        write_json(
            config.out_file, {"flags": asdict(config), "questions": len(questions), "metrics": results}
        )
    if config.picture:
        draw(tables, config.picture)
