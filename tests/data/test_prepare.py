"""data/prepare.py: rows in the publishers' layouts, with contents made up here, through our own readers."""

import csv
import gzip
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from common.rows import read_pairs, read_prompts
from data import prepare
from metrics.answers import read_problems
from metrics.choices import read_questions
from scripts import call
from tiny import lines

ASK = "\n\nHuman: Best fruit?\n\nAssistant:"
PAIR = {"prompt": ASK, "chosen": " The fig.", "rejected": " Mud."}
HI = {"content": "Hi", "role": "user"}
HELLO, GO, EMPTY = ({"content": text, "role": "assistant"} for text in ("Hello", "Go away", ""))
MESSAGE_PAIR = {"prompt": [HI], "chosen": [HELLO], "rejected": [GO]}
HH = [
    {"chosen": f"{ASK} The fig.", "rejected": f"{ASK} Mud."},
    {"chosen": f"{ASK} Why?{ASK} The fig.", "rejected": f"{ASK} Why?{ASK} Mud."},
    {"chosen": f"{ASK} The fig.", "rejected": ASK},  # an empty answer
    {"chosen": f"{ASK} The fig.", "rejected": f"{ASK} "},
    {"chosen": f"{ASK} The fig.", "rejected": "\n\nHuman: Worst?\n\nAssistant: Mud."},  # no shared prompt
]
HH_PAIRS = [PAIR, PAIR | {"prompt": f"{ASK} Why?{ASK}"}]
ULTRAFEEDBACK = [
    {"prompt": "Hi", "prompt_id": "a1", "chosen": [HI, HELLO], "rejected": [HI, GO], "messages": [HI, HELLO]},
    {
        "prompt": "Hi",
        "prompt_id": "a2",
        "chosen": [HI, HELLO],
        "rejected": [HI, EMPTY],
        "messages": [HI, HELLO],
    },
]
SHP = {"post_id": "q1", "domain": "askculinary_train", "upvote_ratio": 0.9, "history": "Best fruit?"}
SHP |= {"score_A": 9, "score_B": 3, "score_ratio": 3.0}


def stack_answer(number, score, text):
    author = {
        "author": f"User {number}",
        "author_id": number,
        "author_profile": f"https://example.org/{number}",
    }
    return {"answer_id": number, **author, "pm_score": score, "selected": score > 4, "text": text}


STACK = {"qid": 7, "question": "<p>Is <code>1 &lt; 2</code>?</p>\n", "date": "2020/01/31"}
STACK |= {"metadata": ["https://example.org/q/7", "https://example.org", "https://example.org/u/1"]}
STACK_ANSWERS = [
    stack_answer(1, 2, "<p>Maybe.</p>"),
    stack_answer(2, 5, "<p>Yes &amp; no.</p>"),
    stack_answer(3, 0, "No."),
]

# name: (rows in the publisher's layout, how we read our file, what is read from it)
CASES = {
    "hh": (HH, read_pairs, 4 * HH_PAIRS),
    "hh-harmless": (HH, read_pairs, HH_PAIRS),
    "hh-helpful": (HH, read_pairs, HH_PAIRS),
    "ultrafeedback": (
        [row | {"score_chosen": 8.5, "score_rejected": 6.0} for row in ULTRAFEEDBACK],
        read_pairs,
        [MESSAGE_PAIR],
    ),
    "ultrafeedback-armorm": (
        [
            row | {"all_generated_responses": ["Hello"] * 5, "all_rm_scores": [0.1] * 5}
            for row in ULTRAFEEDBACK
        ],
        read_pairs,
        2 * [MESSAGE_PAIR],
    ),
    "imdb": (
        [
            {"text": "A film", "chosen": "A film. A joy", "rejected": "A film so so"},
            {"text": "A film", "chosen": "A film. A joy", "rejected": "A film"},
        ],
        read_pairs,
        [{"prompt": "A film", "chosen": ". A joy", "rejected": " so so"}],
    ),
    "shp": (
        [
            SHP | {"human_ref_A": "The fig.", "human_ref_B": "Mud.", "labels": 1},
            SHP | {"human_ref_A": "Mud.", "human_ref_B": "The fig.", "labels": 0},
        ],
        read_pairs,
        4 * [PAIR],
    ),
    "stack-exchange": (
        [
            STACK | {"answers": STACK_ANSWERS},
            STACK | {"answers": [stack_answer(n, 1, "Yes.") for n in (1, 2)]},
        ],
        read_pairs,
        5 * [{"prompt": "\n\nHuman: Is 1 < 2?\n\nAssistant:", "chosen": " Yes & no.", "rejected": " No."}],
    ),
    "gsm8k": (
        [{"question": "Two figs and 1?", "answer": "2 + 1 = <<2+1=3>>3\n#### 3"}],
        lambda path: [problem._asdict() | {"read_answer": None} for problem in read_problems(path)],
        [{"question": "Two figs and 1?", "gold": "3", "read_answer": None, "level": None}],
    ),
    "math": (
        [
            {
                "problem": "What is $2^2$?",
                "solution": r"It is $\boxed{4}$.",
                "answer": "4",
                "subject": "Algebra",
            }
            | {"level": 3, "unique_id": "test/algebra/1.json"}
        ],
        lambda path: [problem._asdict() | {"read_answer": None} for problem in read_problems(path)],
        [{"question": "What is $2^2$?", "gold": "4", "read_answer": None, "level": 3}],
    ),
    "mmlu": (
        [{"question": "Best?", "subject": "botany", "choices": ["Mud", "Fig", "Tin", "Ash"], "answer": 1}],
        lambda path: read_questions(path, False, 0),
        [("Best?", ["Mud", "Fig", "Tin", "Ash"], 1)],
    ),
    "arena-hard": (
        [{"uid": "u1", "category": "arena-hard-v0.1", "cluster": "Fruit", "prompt": "Write on figs."}],
        read_prompts,
        [{"uid": "u1", "prompt": "Write on figs."}],
    ),
    "alpaca-eval": (
        [{"dataset": "koala", "instruction": "Write on figs.", "output": "Figs ...", "generator": "davinci"}],
        read_prompts,
        [{"prompt": "Write on figs."}],
    ),
}
TRUTHFULQA = {
    "type": "Adversarial",
    "category": "Fruit",
    "question": "Are figs mud?",
    "best_answer": "No",
    "correct_answers": ["No", "They are fruit"],
    "incorrect_answers": ["Yes", "Some are", "All are mud"],
    "source": "https://example.org",
}


def publish(name, rows, folder, split=None):
    """Write the rows to every file of a split, as on the hub."""
    splits = prepare.SOURCES[name].splits
    for file in splits[split or next(iter(splits))][1]:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            data = json.dumps(rows).encode() if path.suffix == ".json" else lines(*rows)
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def download(*_, **__):
        raise AssertionError("--from_dir downloads nothing")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def test_every_source_has_a_case():
    assert set(CASES) | {"truthfulqa"} == set(prepare.SOURCES)


@pytest.mark.parametrize("name", CASES)
def test_converted_rows_are_what_our_readers_read(name, tmp_path, capsys, no_network):
    rows, read, expected = CASES[name]
    publish(name, rows, tmp_path)
    out = tmp_path / "out.jsonl.gz"
    call(prepare, name, from_dir=tmp_path, out_file=out)
    printed = capsys.readouterr()
    assert f"{len(expected)} rows in {out}" in printed.out
    assert ("left out" in printed.out) == (name.startswith(("hh", "ultra", "imdb", "stack")))
    assert ("on the hub" in printed.err) == (name != "stack-exchange")  # its number of rows is not known
    assert list(read(out)) == expected


def test_hh_is_split_as_our_reader_splits_the_transcripts(tmp_path, no_network):
    publish("hh-helpful", HH[:2], tmp_path, "test")
    out = tmp_path / "out.jsonl"
    call(prepare, "hh-helpful", split="test", from_dir=tmp_path, out_file=out)
    assert read_pairs(out) == read_pairs(tmp_path / "helpful-base/test.jsonl.gz")
    assert [row["prompt"] for row in read_prompts(out)] == [pair["prompt"] for pair in HH_PAIRS]


def test_truthfulqa_reads_like_the_csv_of_its_authors(tmp_path, no_network):
    publish("truthfulqa", [TRUTHFULQA], tmp_path)
    out = tmp_path / "out.jsonl"
    call(prepare, "truthfulqa", from_dir=tmp_path, out_file=out)
    table = {"Type": "Adversarial", "Category": "Fruit", "Question": "Are figs mud?", "Best Answer": "No"}
    table |= {"Correct Answers": "No; They are fruit", "Incorrect Answers": "Yes; Some are; All are mud"}
    with open(tmp_path / "TruthfulQA.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table)
        writer.writeheader()
        writer.writerow(table)
    for binary in (False, True):
        assert read_questions(out, binary, 0) == read_questions(tmp_path / "TruthfulQA.csv", binary, 0)
    assert sorted(read_questions(out, False, 0)[0].options) == ["All are mud", "No", "Some are", "Yes"]


def test_stack_exchange_keeps_what_its_licence_asks_for(tmp_path, no_network):
    publish("stack-exchange", [STACK | {"answers": STACK_ANSWERS}], tmp_path)
    call(prepare, "stack-exchange", from_dir=tmp_path, out_file=tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert row["authors"] == ["User 2", "User 3"] and row["links"] == STACK["metadata"]


def test_download(tmp_path, monkeypatch, capsys):
    rows = [{"problem": f"{n}?", "solution": rf"\boxed{{{n}}}", "level": 1} for n in range(500)]
    publish("math", rows, tmp_path / "hub")
    asked = []

    def download(repo, file, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    call(prepare, "math", out_file=tmp_path / "out.jsonl.gz")
    assert asked == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset", prepare.SOURCES["math"].revision)]
    assert "warning" not in capsys.readouterr().err  # all rows are there
    assert (tmp_path / "out.jsonl.gz").read_bytes()[3:8] == bytes(5)  # gzip's header: no name, no time


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error, fragment",
    [
        (
            LocalEntryNotFoundError("An error happened.\nMore lines."),
            "cannot be downloaded (An error happened.)",
        ),
        (HTTPError("The read operation timed out"), "timed out"),
        (RuntimeError("Data processing error: CAS"), "CAS"),
        (
            RepositoryNotFoundError("401\n\nNot found.", response=RESPONSE),
            "if it was renamed, correct the table",
        ),
    ],
    ids=["offline", "cut off", "xet", "renamed"],
)
def test_failed_download_is_one_line(error, fragment, tmp_path, monkeypatch, refused):
    def download(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    arguments = ["gsm8k", "--out_file", tmp_path / "out.jsonl"]
    refused(prepare, arguments, "openai/gsm8k/main/test-00000-of-00001.parquet", fragment)
    assert not list(tmp_path.iterdir())


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(prepare, ["gsm8k", "--out_file", tmp_path / "out.jsonl"], "openai/gsm8k", "--from_dir")


def test_list(capsys):
    call(prepare, "--list")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + sum(len(source.splits) for source in prepare.SOURCES.values())
    assert any(line.split()[:4] == ["gsm8k", "train", "7,473", "MIT"] for line in printed)
