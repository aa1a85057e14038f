"""Every recipe is read by its script, and runs on a tiny model and three pairs."""

import json
import os
import subprocess

import pytest

import sample
import train_dpl
import train_mallows
import train_reward
import train_rl
from common.files import ROOT
from common.flags import parse
from scripts import call, read_lines, run_script, train
from tiny import PAIRS, lines

DPL = train_dpl.DPLConfig, train_dpl
MALLOWS = train_mallows.MallowsConfig, train_mallows
RECIPES = {
    "debates": MALLOWS,
    "hh_dpl": DPL,
    "hh_reward": (train_reward.RewardConfig, train_reward),
    "hh_sample": (sample.SampleConfig, sample),
    "imdb_mallows": MALLOWS,
    "llama3_mallows": MALLOWS,
    "pythia_mallows": MALLOWS,
    "society": DPL,
    "society_rl": (train_rl.RLConfig, train_rl),
    "zephyr_dpl": DPL,
}
# What the papers print: appendices B.3 and C.3 of DPL's; appendices C.2, C.3 and Table 1 of MallowsPO's
RMSPROP = {"optimizer": "rmsprop", "lr": 1e-6, "warmup_steps": 150}
PRINTED = {
    "hh_dpl": {"beta": 0.1, "lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0.05, "batch_size": 8}
    | {"max_steps": 5000, "max_length": 512, "lr": 1e-5, "warmup_steps": 150},
    "zephyr_dpl": {"beta": 0.1, "lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.05, "batch_size": 4}
    | {"max_steps": 0, "epochs": 1, "max_length": 1024, "lr": 1e-5, "warmup_steps": 150},
    "hh_sample": {"num_samples": 16, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0},
    "pythia_mallows": {**RMSPROP, "batch_size": 32, "beta": 0.1},
    "imdb_mallows": {**RMSPROP, "batch_size": 64},
    "llama3_mallows": {"loss": "theta", "beta": 0.01, "lr": 5e-7},
}


def read(name, *flags):
    """The config of a recipe, with `flags` after it."""
    config, _ = RECIPES[name]
    return parse(config, None, [f"@recipes/{name}.txt", *flags])


def test_every_recipe_is_tested():
    assert sorted(RECIPES) == sorted(path.stem for path in (ROOT / "recipes").glob("*.txt"))


@pytest.mark.parametrize("name", PRINTED)
def test_a_recipe_has_the_numbers_that_its_paper_prints(name):
    config = read(name)
    assert {key: getattr(config, key) for key in PRINTED[name]} == PRINTED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_flag_after_a_recipe_replaces_the_recipe_s(name):
    assert read(name, "--model", "another").model == "another"
    assert read(name).model != "another"


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"hh_sample"}))
def test_a_recipe_trains(name, tiny_model_folder, data, tmp_path):
    out = tmp_path / "runs" / name
    data = ROOT / "data/society/prompts.jsonl" if name == "society_rl" else data  # whose rewards are known
    flags = {"model": tiny_model_folder, "data": data, "out_dir": out, "max_steps": 2, "log_every": 1}
    first, _, last = train(RECIPES[name][1], f"@recipes/{name}.txt", **flags)
    assert first["step"] == 0 and last["step"] == 2
    assert first["grad_norm"] > 0
    flags, recipe = json.loads((out / "run.json").read_bytes()), read(name)
    assert (flags["lr"], flags["batch_size"]) == (recipe.lr, recipe.batch_size)
    assert (out / f"{'adapter_model' if recipe.lora_rank else 'model'}.safetensors").is_file()


def test_the_sampling_recipe_samples(tiny_model_folder, data, tmp_path):
    flags = {"model": tiny_model_folder, "prompts": data, "out_file": tmp_path / "out.jsonl"}
    call(sample, "@recipes/hh_sample.txt", **flags, num_samples=2, max_new_tokens=5)
    prompts = [row["prompt"] for row in read_lines(tmp_path / "out.jsonl")]
    assert prompts == [row["prompt"] for row in PAIRS for _ in range(2)]


def test_each_round_starts_from_the_policy_of_the_round_before(tmp_path):
    """recipes/rounds.sh, with a `python` that prints its words."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REWARD": "reward", "OUT": "out"}
    command = [ROOT / "recipes/rounds.sh", "--loss", "phi"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    scripts = ["sample.py", "make_pairs.py", "train_mallows.py"]
    assert [line[0].rsplit("/", 1)[1] for line in words] == scripts * 2
    [first, _, trained, second, pairs, _] = words
    assert first[2].endswith("data/society/reference") and trained[1:3] == ["--loss", "phi"]
    assert trained[-2] == "out/1/policy" and second[second.index("--model") + 1] == "out/1/policy"
    drawn = second[second.index("--out_file") + 1]
    assert drawn == pairs[pairs.index("--samples") + 1] == "out/2/samples.jsonl"


def test_a_sweep_shares_one_reference_cache(tiny_model_folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(lines(*PAIRS))
    environment = os.environ | {"ALPHAS": "0.1 0.3", "RUN": "echo", "OUT": "sweep"}
    flags = ["--model", tiny_model_folder, "--data", "pairs.jsonl", "--max_steps", "1"]
    command = [ROOT / "recipes" / "sweep.sh", f"@{ROOT}/recipes/society.txt", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    for command in done.stdout.splitlines():
        codes, _, stderr = run_script(1, "train_dpl.py", *command.split()[1:], folders=[tmp_path])
        assert codes == [0], stderr
    sweep = tmp_path / "sweep"
    assert sorted(path.name for path in sweep.iterdir()) == ["alpha_0.1", "alpha_0.3", "reference_cache"]
    assert len(list((sweep / "reference_cache").iterdir())) == 1
    for alpha in (0.1, 0.3):
        flags = json.loads((sweep / f"alpha_{alpha}" / "run.json").read_bytes())
        assert (flags["alpha"], flags["lr"], flags["max_steps"]) == (alpha, 4e-3, 1)
