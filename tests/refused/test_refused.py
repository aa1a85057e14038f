"""Whatever is wrong with the input: one line on stderr says what and where, exit code 2, nothing is written.

A row of ROWS is name: (scripts, flags, files, *fragments of the line). Each script runs in a folder of good
input, `here`, with its flags in GOOD, if it is there, and the row's behind them. `files` says what differs
in the folder: a path and its bytes or text, keys to change in a .json file, or a function of the path.
"""

import importlib
import json
import shlex
import shutil

import pytest

from refused import evaluating, folders, sampling, training
from scripts import run_script
from tiny import PAIRS, lines

RUN = "--model model --data pairs.jsonl --out_dir out/run --lora_rank 2"
EVALUATE = "--samples samples.jsonl --out_file out/result.json"
GOOD = {
    "train_dpl": RUN,
    "train_mallows": RUN,
    "train_reward": RUN,
    "train_rl": RUN,
    "train_sft": RUN,
    "experiments.divergences": RUN,
    "sample": "--model model --prompts pairs.jsonl --out_file out/x.jsonl --num_samples 1 --max_new_tokens 1",
    "evaluate society": EVALUATE,
    "evaluate diversity": EVALUATE,
    "evaluate quality": EVALUATE,
    "evaluate judge": EVALUATE,
    "evaluate winrate": EVALUATE,
    "evaluate choices": "--models model --questions mmlu.jsonl --out_file out/result.json",
    "evaluate answers": "--problems problems.jsonl --samples dpo.jsonl dpl.jsonl --out_file out/result.json",
    "data.make_pairs": "--samples samples.jsonl --out_file out/pairs.jsonl",
}
ROWS = training.ROWS | folders.ROWS | sampling.ROWS | evaluating.ROWS
assert len(ROWS) == sum(len(part.ROWS) for part in (training, folders, sampling, evaluating))  # no name twice
CASES = [(scripts, flags, files, fragments) for scripts, flags, files, *fragments in ROWS.values()]


@pytest.fixture(scope="module")
def good(tiny_model_folder, finished_run, reward_folder, tmp_path_factory):
    """A folder of good input to every script."""
    folder = tmp_path_factory.mktemp("good")
    for name, path in (("model", tiny_model_folder), ("run", finished_run), ("reward", reward_folder)):
        shutil.copytree(path, folder / name)
    for name, rows in (evaluating.FILES | {"pairs.jsonl": PAIRS}).items():
        (folder / name).write_bytes(lines(*rows))
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """A copy of it, to damage: the working directory."""
    monkeypatch.chdir(shutil.copytree(good, tmp_path / "here"))
    return tmp_path / "here"


def damage(path, change):
    """Make one of a row's changes in the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(change):
        change(path)
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())


def contents(folder):
    """Every path below a folder, with its bytes if it is a file."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("scripts", "flags", "files", "fragments"), CASES, ids=ROWS)
def test_refused(refused, here, scripts, flags, files, fragments):
    for path, change in files.items():
        damage(here / path, change)
    before = contents(here)
    for script in scripts.split(", "):
        name, *start = script.split()
        words = [*start, *shlex.split(GOOD.get(script, "")), *shlex.split(flags)]
        refused(importlib.import_module(name), words, *fragments)
        assert contents(here) == before


@pytest.mark.parametrize("words", ["train_dpl.py --model model --data", "evaluate.py society --samples"])
def test_as_a_user_sees_it(here, words):
    before, found = contents(here), run_script(1, *words.split(), "missing.jsonl", folders=[here])
    assert found == ([2], "", "error: missing.jsonl: no such file\n") and contents(here) == before
