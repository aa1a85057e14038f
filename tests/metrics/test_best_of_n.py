"""evaluate.py answers from rows to tables, and the templates of sample.py."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from common.files import ROOT, InputError
from common.rows import Sample, read_rows
from metrics import tables
from metrics.answers import (
    Config,
    Problem,
    compare,
    grade,
    match_samples,
    read_problems,
    samples_needed,
    split_problems,
    unique_answers,
)
from metrics.equality import gsm8k_answer, math_answer
from scripts import call
from tiny import lines, train_tokenizer

EGGS = {"question": "Ann has 2 eggs and lays 3. How many?", "answer": "2 + 3 = 5, <<2+3=5>>5.\n#### 5"}
CATS = {"question": "Bo has 1,000 cats and sells 400. How many?", "answer": "He keeps 600.\n#### 600"}
ROOTS = {
    "problem": "Solve $x^{2}=\\frac{1}{4}$.",
    "solution": "So $x=\\boxed{\\frac{1}{2}}$.",
    "level": "Level 5",
}
SHOT = "Q: What is 1 + 1?\nA: #### 2\n\nQ: "


def rows(problem, texts):
    return [{"prompt": f"{SHOT}{problem['question']}\nA:", "completion": text} for text in texts]


# ---- rows


def test_read_problems(tmp_path):
    levels = ["Level 5", 5, "5", 5.0, None, "Level ²", "1" * 5000]
    (tmp_path / "a.jsonl").write_bytes(lines(EGGS, CATS, *(ROOTS | {"level": level} for level in levels)))
    eggs, cats, *roots = read_problems(tmp_path / "a.jsonl")
    assert eggs == (EGGS["question"], "5", gsm8k_answer, None) and cats.gold == "600"
    assert {(p.question, p.gold, p.read_answer) for p in roots} == {
        (ROOTS["problem"], "\\frac{1}{2}", math_answer)
    }
    assert [problem.level for problem in roots] == [5, 5, 5, 5, None, None, 111_111_111]


def match(tmp_path, questions, prompts):
    """Index of the problem that each prompt belongs to."""
    samples = [{"prompt": prompt, "completion": str(i)} for i, prompt in enumerate(prompts)]
    (tmp_path / "s.jsonl").write_bytes(lines(*samples))
    problems = [Problem(question, "1", gsm8k_answer, None) for question in questions]
    matched = match_samples(tmp_path / "s.jsonl", problems)
    found = {int(sample.text): index for index, group in matched.items() for sample in group}
    return [found[i] for i in range(len(prompts))]


def test_samples_belong_to_the_problem_whose_question_is_asked(tmp_path):
    inner, outer = "How many?", "Bo has 3 cats. How many? Give half of them."
    message = [{"role": "system", "content": "Count."}, {"role": "user", "content": f"Q: {outer}"}]
    prompts = [f"{SHOT}{inner}\nA:", f"{SHOT}{outer}\nA:", inner, [message[1]], message]
    assert match(tmp_path, [inner, outer], prompts) == [0, 1, 0, 1, 1]
    assert match(tmp_path, [f" {outer}\n", inner], prompts) == [1, 0, 1, 0, 0]
    assert match(tmp_path, ["many?", "How many?"], ["Q: How many?"]) == [1]  # both end at the same place


def test_a_question_of_the_examples_is_not_the_one_asked(tmp_path):
    """The first examples of a few-shot prompt may be problems of the file, and longer than the question."""
    example, question = "What is the sum of all the numbers from 1 to 4?", "What is 1 + 1?"
    prompts = [f"Q: {example}\nA: 10\n\nQ: {question}\nA:", f"Q: {question}\nA: 2\n\nQ: {example}\nA:"]
    assert match(tmp_path, [example, question], prompts) == [1, 0]


def test_a_prompt_without_a_question_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"s\.jsonl: the prompt 'Q: Who\?' holds no question"):
        match(tmp_path, ["How many?"], ["Q: How many?", "Q: Who?"])


# ---- splits


def test_math_is_split_by_level():
    problems = [Problem("q", "1", math_answer, level) for level in (5, 3, 1, 2, 5, None)]
    splits = split_problems([0, 1, 3, 4, 5], problems, None)
    assert {k: v.tolist() for k, v in splits.items()} == {
        "all": [0, 1, 2, 3, 4],
        "medium": [1],
        "hard": [0, 3],
    }


def test_gsm8k_is_split_by_the_samples_that_the_base_model_needs():
    solved_at = [1, 4, 5, 64, 65, None, None, None]  # of tries samples
    tries = [1, 64, 5, 64, 65, 64, 10, 0]
    base = {
        i: [Sample("q", "#### 1" if j == at else "#### 2") for j in range(1, n + 1)]
        for i, (at, n) in enumerate(zip(solved_at, tries, strict=True))
        if n
    }
    problems = [Problem("q", "1", gsm8k_answer, None) for _ in tries]
    splits = split_problems(list(range(8)), problems, base)
    expected = {"all": list(range(8)), "easy": [0, 1], "medium": [2, 3], "hard": [4, 5]}
    assert {k: v.tolist() for k, v in splits.items()} == expected
    assert split_problems([7, 2], problems, base)["medium"].tolist() == [1]  # a position, not an index
    assert [*split_problems(list(range(8)), problems, None)] == ["all"]


# ---- metrics


def test_grade_reads_and_compares_answers():
    problems = [Problem("q", "5", gsm8k_answer, None), Problem("q", r"\frac{1}{2}", math_answer, 1)]
    texts = {1: [r"\boxed{0.5}", r"\boxed{\dfrac12}", "0.5"], 0: ["#### $5.00", "6 or 5", "none"]}
    graded = grade({i: [Sample("q", t) for t in group] for i, group in texts.items()}, problems, "dpl")
    assert graded.correct.tolist() == [[1, 1, 0], [1, 1, 0]]
    assert graded.answers == [["0.5", "1/2", None], ["5", "5", None]]


@pytest.mark.parametrize("answers", [["1", "1", "2", None, "3"], [None] * 3, ["1"], [*"112233", None]])
def test_unique_answers_is_the_mean_over_all_subsets(answers):
    for k in range(1, len(answers) + 1):
        shares = [len({*subset} - {None}) / k for subset in combinations(answers, k)]
        assert unique_answers(answers, k) == pytest.approx(np.mean(shares))


def test_samples_needed():
    curve, ks = np.array([0.2, 0.5, 0.7, 0.8]), np.arange(1.0, 5)
    assert samples_needed(curve, curve).tolist() == [1, 2, 3, 4]
    assert samples_needed(curve, np.array([0.1, 0.35, 0.5, 0.81])) == pytest.approx([1, 1.5, 2, math.inf])
    # a flat stretch is reached at its start
    flat = np.array([0.5, 0.5, 1, 1])
    assert samples_needed(flat, np.array([0.5, 0.75, 1, 1])) == pytest.approx([1, 2, 3, 3])
    assert samples_needed(np.zeros(4), np.array([0, 0.1, 0.2, 0.3])).tolist() == [1, *[math.inf] * 3]
    assert samples_needed(np.ones(4), ks / 4).tolist() == [1] * 4


def test_compare():
    solved = {"dpo": [[1, 0], [1, 1], [0, 0], [0, 0]], "dpl": [[1, 0], [0, 0], [0, 1], [0, 0]]}
    curves = {name: {"best-of-N": np.array([[np.mean(x), max(x)] for x in c])} for name, c in solved.items()}
    results = compare(curves, np.arange(4), seed=0)
    dpo, dpl = results.values()
    assert dpo["best-of-N"] == [3 / 8, 1 / 2] and dpl["best-of-N"] == [1 / 4, 1 / 2]
    assert dpo["relative"] == [1, 1] and dpl["relative"] == pytest.approx([2 / 3, 1])
    assert dpo["needed"] == [1, 2] and dpl["needed"] == pytest.approx([1.5, 2])
    # problem 0: both, 1: dpo, 2: dpl, 3: nobody
    assert dpo["share best"] == dpl["share best"] == 1.5 / 3
    for row in results.values():
        assert [*row["intervals"]] == ["best-of-N", "relative"]
        for k, (low, high) in row["intervals"]["best-of-N"].items():
            assert low < row["best-of-N"][k - 1] < high
    part = compare(curves, np.array([0, 1]), seed=0)
    assert part["dpo"]["intervals"]["relative"] == {1: (1, 1), 2: (1, 1)}  # a ratio to itself
    low, high = part["dpl"]["intervals"]["relative"][2]
    assert 0 <= low < part["dpl"]["relative"][1] == 0.5 < high <= 1
    assert math.isnan(dpl["intervals"]["relative"][1][0])  # some resample has no problem that dpo solves
    assert part["dpo"]["best-of-N"] == [3 / 4, 1] and part["dpl"]["share best"] == 0.25
    nobody = compare(curves, np.array([3]), seed=0)
    assert math.isnan(nobody["dpo"]["share best"]) and math.isnan(nobody["dpo"]["relative"][0])


# ---- evaluate.py answers


@pytest.fixture
def files(tmp_path):
    """Samples of two policies, of which n = 3 for each of the two problems in both are compared."""
    (tmp_path / "problems.jsonl").write_bytes(lines(EGGS, CATS, EGGS | {"question": "Zoë has 5. How many?"}))
    dpo = rows(EGGS, ["2 + 3 = 5\n#### 5", "#### 5", "#### 6"]) + rows(CATS, ["#### 500", "#### 500", "None"])
    dpl = rows(CATS, ["#### 600.00", "#### 400", "#### 500"]) + rows(
        EGGS, ["", "It is 5", "#### 7", "#### 5"]
    )
    dpl += rows({"question": "Zoë has 5. How many?"}, ["#### 5"] * 3)  # not in the other file
    base = rows(EGGS, ["#### 4", "#### 5"]) + rows(CATS, ["#### 1"] * 64)
    for name, samples in (("dpo", dpo), ("dpl", dpl), ("base", base)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*samples))
    return tmp_path


@pytest.fixture
def run(files, evaluated):
    """A function that runs evaluate.py answers; returns its results and what it printed."""

    def run(*words, **flags):
        flags |= {"problems": files / "problems.jsonl", "samples": [files / "dpo.jsonl", files / "dpl.jsonl"]}
        result, printed = evaluated("answers", *words, **flags)
        return result["results"], printed

    return run


def test_answers_of_two_policies(files, run):
    result, printed = run(base_samples=files / "base.jsonl", picture=files / "picture.png")
    assert [*result] == ["all", "easy", "hard"] and all([*rows] == ["dpo", "dpl"] for rows in result.values())
    dpo, dpl = result["all"].values()
    assert dpo["best-of-N"] == pytest.approx([1 / 3, 1 / 2, 1 / 2])  # 2 of 3 are right, and none of 3
    assert dpl["best-of-N"] == pytest.approx([1 / 3, 2 / 3, 1])  # 1 of 3, twice
    assert dpl["relative"] == pytest.approx([1, 4 / 3, 2])
    assert dpl["needed"] == pytest.approx([1, 1.5, 1.5])
    assert dpo["unique answers"] == pytest.approx([5 / 6, (5 / 3 + 1) / 4, (2 + 1) / 6])
    assert dpl["unique answers"] == pytest.approx([5 / 6, (4 / 3 + 2) / 4, (2 + 3) / 6])
    assert [row["share best"] for row in (dpo, dpl)] == [1 / 2, 1 / 2]
    assert result["easy"]["dpo"]["best-of-N"] == pytest.approx([2 / 3, 1, 1])
    assert result["hard"]["dpl"]["best-of-N"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert (files / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "dpl: 2 problems, 3 samples each, 16.7% of answers could not be read" in printed.out
    warnings = printed.err.splitlines()
    assert "warning: dpl: 1 problems are not in all files: left out" in warnings
    assert "warning: dpl: 3 of up to 4 samples per problem are used" in warnings
    printed = printed.out
    assert "all: 2 problems" in printed and "easy: 1 problems" in printed and "0.667 [" in printed


@torch.no_grad()
def test_answers_chosen_by_a_reward_model(files, run, reward_folder):
    result, printed = run(reward_model=reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = train_tokenizer("bytes")
    rights = {"dpo": [[1, 1, 0], [0, 0, 0]], "dpl": [[0, 1, 0], [1, 0, 0]]}
    for name, correct in rights.items():
        expected = []
        samples = [row for _, row in read_rows(files / f"{name}.jsonl")]
        for problem, right in zip((EGGS, CATS), correct, strict=True):
            texts = [row for row in samples if problem["question"] in row["prompt"]][:3]
            ids = [tokenizer(x["prompt"]).input_ids + tokenizer(x["completion"]).input_ids for x in texts]
            rewards = [model(torch.tensor([row + [tokenizer.eos_token_id]])).logits.item() for row in ids]
            assert max(rewards) - min(rewards) > 1e-3
            best = lambda subset: max(subset, key=rewards.__getitem__)  # noqa: B023, E731
            subsets = [combinations(range(3), k) for k in (1, 2, 3)]
            expected.append([np.mean([right[best(subset)] for subset in some]) for some in subsets])
        assert result["all"][name]["chosen by reward"] == pytest.approx(np.mean(expected, axis=0))
    assert "chosen by reward" in printed.out


def test_an_empty_answer_has_a_reward_after_a_chat_template(run, reward_folder, monkeypatch):
    asked, honest = [], tables.to_texts
    monkeypatch.setattr(tables, "to_texts", lambda *a: asked.append(honest(*a)) or asked[-1])
    result, _ = run("--chat", reward_model=reward_folder)
    assert 0 <= result["all"]["dpl"]["chosen by reward"][2] <= 1
    assert all(isinstance(prompt, list) for prompts, *_ in asked for prompt in prompts) and asked


# ---- sample.py --prompt_template


@pytest.mark.parametrize("name", ["gsm8k", "math", None])
def test_prompts_are_the_filled_template(name, tiny_model_folder, tmp_path):
    path = ROOT / f"data/prompts/{name}.txt" if name else tmp_path / "template.txt"
    if not name:
        path.write_text("\\boxed{answer} {{x}} {question}\nÉ {options}: {question}", encoding="utf-8")
    questions = [ROOTS["problem"], "What is {question} in \\frac{1}{2} \\\\ \\1 \\g<0>, {options}?"]
    (tmp_path / "rows.jsonl").write_bytes(lines({"problem": questions[0]}, {"question": questions[1]}))
    files = {"prompts": tmp_path / "rows.jsonl", "out_file": tmp_path / "out.jsonl", "prompt_template": path}
    call("sample.py", model=tiny_model_folder, **files, num_samples=2, max_new_tokens=2)
    before, *rest = path.read_text(encoding="utf-8").rstrip("\n").split("{question}")
    assert rest
    expected = [before + "".join(question + part for part in rest) for question in questions for _ in "12"]
    assert [row["prompt"] for _, row in read_rows(tmp_path / "out.jsonl")] == expected


def test_files_of_the_same_name_are_called_by_their_folders():
    config = Config(problems="p.jsonl", samples=["out/dpo/samples.jsonl", "out/dpl/samples.jsonl"])
    assert config.names() == ["dpo", "dpl"]
    assert Config(problems="p.jsonl", samples=["a/dpo.jsonl", "b/dpl.jsonl"]).names() == ["dpo", "dpl"]
