"""Multiple choice: probabilities against the plain forward pass of transformers, rows, and files in."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.files import ROOT, InputError
from metrics.choices import (
    LETTERS,
    Question,
    calibration,
    choice_probs,
    read_choices,
    read_questions,
    summarize,
)
from metrics.formulas import expected_calibration_error
from tiny import CHATML, GROUPED, lines, make, train_tokenizer

TEMPLATE = "Choose {one}.\n{question}\n{options}\nYour choice ="
QUESTIONS = [
    Question("Is the {options} fig ripe?", ["yes", "no"], 0),
    Question("Best fruit?", ["A fig.", "Mud\nor {question}", "A café", "bread"], 2),
    Question("Who sings?", ["the cat", "the baker", "Zoë", "My friend", "nobody"], 4),
]
TEXTS = [  # what TEMPLATE makes of QUESTIONS
    "Choose {one}.\nIs the {options} fig ripe?\nA. yes\nB. no\nYour choice =",
    "Choose {one}.\nBest fruit?\nA. A fig.\nB. Mud\nor {question}\nC. A café\nD. bread\nYour choice =",
    "Choose {one}.\nWho sings?\nA. the cat\nB. the baker\nC. Zoë\nD. My friend\nE. nobody\nYour choice =",
]
MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "arithmetic"}
TRUTHFUL = {
    "Type": "Adversarial",
    "Question": "What do figs do?",
    "Best Answer": "Nothing",
    "Correct Answers": "Nothing; They grow",
    "Incorrect Answers": "They sing; They bake; They bite;They swim ",
}
WRONG = {"They sing", "They bake", "They bite", "They swim"}


def merge_letters(letters):
    """The byte-level tokenizer with one token for a space and each of `letters`, and two for the others."""
    state = json.loads(train_tokenizer("bytes").backend_tokenizer.to_str())
    for letter in letters:
        state["model"]["vocab"][f"Ġ{letter}"] = len(state["model"]["vocab"])
        state["model"]["merges"].append(["Ġ", letter])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def model():
    """A random Llama whose probabilities are far from uniform."""
    return make(LlamaConfig(**GROUPED | {"vocab_size": 520, "max_position_embeddings": 2048}))


@torch.no_grad()
def plain_probs(model, tokenizer, texts, counts, space=" ", **kwargs):
    """Probabilities of the letters, one text at a time, tokenised with its letter."""
    rows = []
    for text, count in zip(texts, counts, strict=True):
        start, logp = tokenizer(text, **kwargs).input_ids, []
        for letter in LETTERS[:count]:
            ids = tokenizer(text + space + letter, **kwargs).input_ids
            assert ids[: len(start)] == start and len(ids) > len(start)
            scores = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            logp.append(sum(scores[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        rows.append(np.exp(logp) / np.exp(logp).sum())
    return rows


def check(model, tokenizer, chat, expected):
    """Check choice_probs of QUESTIONS against the expected ones, of all together and of each alone."""
    model = copy.deepcopy(model)
    together = choice_probs(model, tokenizer, QUESTIONS, TEMPLATE, chat)
    alone = [choice_probs(model, tokenizer, [question], TEMPLATE, chat)[0] for question in QUESTIONS]
    for probs in (together, alone):
        assert [len(p) for p in probs] == [2, 4, 5]
        for p, q in zip(probs, expected, strict=True):
            np.testing.assert_allclose(p, q, atol=1e-4)
            assert p.sum() == pytest.approx(1)
    assert max(p.max() - p.min() for p in together) > 0.2  # the test would see options that change places


@pytest.mark.parametrize("letters", ["", "AC", "ABCDE"])
def test_probabilities_are_those_of_transformers(model, letters):
    tokenizer = merge_letters(letters)
    lengths = [len(tokenizer(f" {letter}").input_ids) for letter in "ABCDE"]
    assert lengths == [1 if letter in letters else 2 for letter in "ABCDE"]
    check(model, tokenizer, False, plain_probs(model, tokenizer, TEXTS, (2, 4, 5)))


def test_probabilities_for_each_kind_of_tokenizer(model, tokenizer):
    check(model, tokenizer, False, plain_probs(model, tokenizer, TEXTS, (2, 4, 5)))


def test_probabilities_after_a_chat_template(model):
    tokenizer = merge_letters("ABCDE")
    tokenizer.chat_template = CHATML
    texts = [f"<s><|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in TEXTS]
    check(model, tokenizer, True, plain_probs(model, tokenizer, texts, (2, 4, 5), space=""))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        choice_probs(model, tokenizer, QUESTIONS, TEMPLATE, True)


def test_a_question_that_is_too_long_is_refused(model):
    question = Question("Why? " * 2048, ["yes", "no"], 0)
    with pytest.raises(InputError, match=r"a text has \d+ tokens, and the model 2048 positions"):
        choice_probs(model, merge_letters(""), [question], TEMPLATE, False)


# ---- rows


def read(row, binary=False, seed=0):
    return read_choices(row, "rows.jsonl:7", binary, random.Random(seed))


@pytest.mark.parametrize("answer", [1, "B", " b "])
def test_rows_of_mmlu(answer):
    assert read(MMLU | {"answer": answer}) == ("2 + 2?", ["3", "4", "5", "6"], 1)


def test_rows_of_truthfulqa():
    questions = [read(TRUTHFUL, seed=seed) for seed in range(100)]
    for text, options, right in questions:
        assert text == "What do figs do?" and options[right] == "Nothing"
        assert len(options) == 4 and len({*options} - WRONG) == 1
    assert {question.right for question in questions} == {0, 1, 2, 3}
    assert {option for question in questions for option in question.options} == WRONG | {"Nothing"}
    assert questions[5] == read(TRUTHFUL, seed=5)
    few = read(TRUTHFUL | {"Incorrect Answers": "They sing; "})
    assert sorted(few.options) == ["Nothing", "They sing"] and few.options[few.right] == "Nothing"


@pytest.mark.parametrize("newer", [{}, {"Best Incorrect Answer": " They fly "}])
def test_binary_rows_of_truthfulqa(newer):
    questions = [read(TRUTHFUL | newer, binary=True, seed=seed) for seed in range(60)]
    assert all(len(options) == 2 and options[right] == "Nothing" for _, options, right in questions)
    wrong = {question.options[1 - question.right] for question in questions}
    assert wrong == ({"They fly"} if newer else WRONG)
    assert {question.right for question in questions} == {0, 1}


def test_the_order_of_options_depends_on_the_seed_and_not_on_the_name_of_the_file(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines(*[TRUTHFUL] * 20))
    first = read_questions(tmp_path / "a.jsonl", False, 0)
    assert len({question.right for question in first}) == 4  # rows do not share one order
    assert read_questions(tmp_path / "a.jsonl", False, 0) == first
    assert read_questions(tmp_path / "a.jsonl", False, 1) != first
    assert read_questions(tmp_path / "b.jsonl", False, 0) == first


# ---- metrics


def test_summary_by_hand():
    probs = [
        np.array([0.75, 0.25]),
        np.array([0.3, 0.45, 0.25]),
        np.array([0.15, 0.85]),
        np.array([1.0, 0.0]),
    ]
    values = calibration(probs, [0, 1, 1, 1])
    assert values["confidence"].tolist() == [0.75, 0.45, 0.85, 1]
    assert values["accuracy"].tolist() == [1, 1, 1, 0]
    brier, nll = [2 * 0.25**2, 0.3**2 + 0.55**2 + 0.25**2, 2 * 0.15**2, 2], [0.75, 0.45, 0.85, 1e-300]
    np.testing.assert_allclose(values["brier"], brier)
    np.testing.assert_allclose(values["nll"], -np.log(nll))
    result = summarize(values, seed=0)
    assert result["accuracy"]["mean"] == 0.75 and result["confidence"]["mean"] == pytest.approx(0.7625)
    assert result["Brier, 0 to 2"]["mean"] == pytest.approx(np.mean(brier))
    assert result["NLL, nats"]["mean"] == pytest.approx(-np.log(nll).mean())
    # equal width: (0.4, 0.5], (0.7, 0.8], (0.8, 0.9] and (0.9, 1] hold a question each
    assert result["ECE, equal width"]["mean"] == pytest.approx((0.25 + 0.55 + 0.15 + 1) / 4)
    mass = expected_calibration_error(values["confidence"], values["accuracy"], 10, True)
    assert result["ECE, equal mass"]["mean"] == pytest.approx(mass)
    for row in result.values():
        assert row["low"] <= row["mean"] <= row["high"] and row["low"] < row["high"]
    calibrated = {"confidence": np.full(500, 0.7), "accuracy": np.repeat([1.0, 0.0], [350, 150])}
    ece = summarize(values | calibrated, seed=0)["ECE, equal width"]
    assert 0 <= ece["low"] <= ece["mean"] + 1e-9 and ece["mean"] < 1e-9  # resamples alone are above 0.01
    assert summarize(values, seed=0) == result != summarize(values, seed=1)


# ---- evaluate.py choices


@pytest.fixture
def run(tiny_model_folder, evaluated):
    """A function that runs evaluate.py choices; returns its metrics and what it printed."""

    def run(*words, **flags):
        result, printed = evaluated("choices", *words, models=tiny_model_folder, **flags)
        [metrics] = result["metrics"].values()
        return metrics, printed.out

    return run


def test_a_file_of_mmlu(run, tiny_model_folder, tmp_path):
    rows = [MMLU | {"question": f"{i} + {i}?", "answer": i % 4} for i in range(6)]
    (tmp_path / "mmlu.jsonl").write_bytes(lines(*rows))
    files = {"questions": tmp_path / "mmlu.jsonl", "picture": tmp_path / "picture.png"}
    result, printed = run(**files)
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_model_folder), train_tokenizer("bytes")
    template = (ROOT / "data/prompts/choices.txt").read_text().rstrip("\n")
    options = "A. 3\nB. 4\nC. 5\nD. 6"
    texts = [template.replace("{question}", r["question"]).replace("{options}", options) for r in rows]
    probs = plain_probs(model, tokenizer, texts, [4] * 6)
    assert result["confidence"]["mean"] == pytest.approx(np.mean([p.max() for p in probs]), abs=1e-5)
    nll = [-math.log(p[i % 4]) for i, p in enumerate(probs)]
    assert result["NLL, nats"]["mean"] == pytest.approx(np.mean(nll), abs=1e-4)
    assert "6 questions" in printed and f"{result['accuracy']['mean']:.3f} [" in printed
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "template.txt").write_text("{options}\n{question}")
    other, printed = run("--overwrite", **files, template=tmp_path / "template.txt", limit=2)
    assert other["confidence"]["mean"] != result["confidence"]["mean"] and "2 questions" in printed


def test_a_csv_file_of_truthfulqa(run, tmp_path):
    text = 'Question,Best Answer,Incorrect Answers\n"Figs, do they sing?","No,\nnever",Yes; Often; At night\n'
    text += "Do cats?,They do,They do not\n"
    (tmp_path / "truthful.csv").write_text(text, encoding="utf-8-sig")
    [first, second] = read_questions(tmp_path / "truthful.csv", False, 0)
    assert first.text == "Figs, do they sing?" and first.options[first.right] == "No,\nnever"
    assert sorted(first.options) == ["At night", "No,\nnever", "Often", "Yes"] and len(second.options) == 2
    result, printed = run(questions=tmp_path / "truthful.csv")
    assert 0.25 <= result["confidence"]["mean"] <= 1 and "2 questions" in printed
    result, _ = run("--overwrite", "--binary", questions=tmp_path / "truthful.csv")
    assert 0.5 <= result["confidence"]["mean"] <= 1
