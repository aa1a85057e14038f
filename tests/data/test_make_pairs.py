"""data/make_pairs.py: which pairs come of which rewards, and that training reads the sampled ids."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from common.encode import encode_answers
from common.files import InputError
from common.rows import read_pairs
from data import make_pairs
from scripts import call, read_lines
from tiny import CHATML, lines, train_tokenizer

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def run(tmp_path):
    """A function that makes pairs of rows (prompt, text, reward) and returns what was written."""

    def make(rows, *flags):
        keys = ("prompt", "completion", "reward", "finish")
        (tmp_path / "samples.jsonl").write_bytes(lines(*(dict(zip(keys, row)) for row in rows)))
        files = {"samples": tmp_path / "samples.jsonl", "out_file": tmp_path / "pairs.jsonl"}
        call(make_pairs, *flags, **files)
        return read_lines(tmp_path / "pairs.jsonl")

    return make


def test_best_against_worst_of_each_prompt(run, capsys):
    rows = [("a", "x", 1), ("a", "y", 3), ("b", "u", 2), ("a", "z", -2), ("b", "v", 2), ("c", "w", 5)]
    assert run(rows) == [{"prompt": "a", "chosen": "y", "rejected": "z"}]
    assert "1 pairs of 3 prompts" in capsys.readouterr().out


def test_labels_have_the_noise_of_bradley_terry(run):
    rows = [("a", "x", 1.0), ("a", "y", 0.0), ("a", "x", 1.0)]
    pairs = run(rows, "--how", "bradley_terry", "--pairs", 4000)
    chosen = sum(pair["chosen"] == "x" for pair in pairs)
    assert len(pairs) == 4000 and {pair["chosen"] for pair in pairs} == {"x", "y"}
    assert binomtest(chosen, 4000, 1 / (1 + math.exp(-1))).pvalue > 1e-4


def test_training_reads_the_sampled_ids(run, tmp_path):
    tokenizer = train_tokenizer("bytes")
    tokenizer.chat_template = CHATML
    texts = [" The fig\n", "Mud"]
    pairs = run([(USER, text, -i) for i, text in enumerate(texts)])
    assert pairs == [{"prompt": USER, "chosen": texts[0], "rejected": texts[1]}]
    [row] = read_pairs(tmp_path / "pairs.jsonl")
    [ids] = encode_answers([row["prompt"]], [row["chosen"]], tokenizer)
    assert tokenizer.decode(ids[:-1]) == texts[0]


def test_texts_that_were_cut_or_are_empty_make_no_pair(run, capsys):
    rows = [("a", "x", 1, "eos"), ("a", "y", 3, "length"), ("a", "z", -2, "stop"), ("b", "w", -5, "length")]
    assert run([*rows, ("a", "", -9, "eos")]) == [{"prompt": "a", "chosen": "x", "rejected": "z"}]
    out = capsys.readouterr().out
    assert "3 of 5 texts were cut" in out and "1 pairs of 2 prompts" in out and "1 prompts gave none" in out
    with pytest.raises(InputError, match=r"no text has an end; sample with more --max_new_tokens"):
        run(rows[1:2], "--overwrite")


def test_messages_stay_messages(run, tmp_path):
    turns = [[*USER, {"role": "assistant", "content": text}] for text in ("The fig", "Mud")]
    (tmp_path / "samples.jsonl").write_bytes(
        lines(*({"messages": m, "reward": -i} for i, m in enumerate(turns)))
    )
    files = {"samples": tmp_path / "samples.jsonl", "out_file": tmp_path / "pairs.jsonl"}
    call(make_pairs, **files)
    [row] = read_pairs(tmp_path / "pairs.jsonl")
    assert [row["prompt"], row["chosen"], row["rejected"]] == [USER, turns[0][1:], turns[1][1:]]


def test_ties_make_no_pair():
    config = make_pairs.PairsConfig(out_file="x.jsonl")
    assert make_pairs.choose(np.array([1.0, 1.0]), ["x", "y"], config, None) == []
