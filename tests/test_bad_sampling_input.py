"""Bad input to sample.py and evaluate.py, and to all as a user sees them: one line, exit code 2."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import sample
from conftest import FIG, PAIR, USER, lines, run_script, truncate

SAMPLE = ["--num_samples", 1, "--max_new_tokens", 1]


def test_sample_keeps_an_existing_file(refused, tiny_model_folder, data):
    before = data.read_bytes()
    flags = ["--model", tiny_model_folder, "--prompts", data, "--out_file", data]
    refused(sample, [*flags, *SAMPLE], f"--out_file {data}: exists; --overwrite replaces it")
    assert data.read_bytes() == before


def test_sample_does_not_write_over_a_folder(refused, tiny_model_folder, data, tmp_path):
    (tmp_path / "folder").mkdir()
    flags = [
        "--model",
        tiny_model_folder,
        "--prompts",
        data,
        "--out_file",
        tmp_path / "folder",
        "--overwrite",
    ]
    refused(sample, [*flags, *SAMPLE], tmp_path / "folder")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "folder", data]


@pytest.mark.parametrize(
    ("rows", "fragment"),
    [
        (None, "prompts.jsonl: no such file"),
        (lines(PAIR, {"text": "a"}), "prompts.jsonl:2: needs a 'prompt', a string or a message list"),
        (lines({"prompt": []}), "prompts.jsonl:1: needs a 'prompt', a string or a message list"),
        (lines({"prompt": [FIG]}), "prompts.jsonl:1: roles out of order: assistant"),
    ],
)
def test_sample_with_bad_prompts(refused, tiny_model_folder, tmp_path, rows, fragment):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "samples" / "out.jsonl"
    if rows is not None:
        path.write_bytes(rows)
    refused(sample, ["--model", tiny_model_folder, "--prompts", path, "--out_file", out, *SAMPLE], fragment)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--num_samples", 0], "--num_samples 0: must be at least 1"),
        (["--prompt", "\udcff"], "the command line or an @file is not UTF-8 text"),
        (["--temperature", 1e-30], "--temperature 1e-30: must be 0, or at least 1e-6"),
        (["--temperature", -1], "--temperature -1.0: must be 0, or at least 1e-6"),
        (["--top_p", 0], "--top_p 0.0: must be in (0, 1]"),
        (["--batch_size", 0], "--batch_size 0: must be at least 1"),
        (["--prompts", ""], "--prompts: is empty; give a value, or leave the flag out"),
        (["--stop", "a", ""], "--stop: is empty; give a value, or leave the flag out"),
        (["--resume", "--overwrite"], "--resume True: must be given without --overwrite"),
        (["--global_temperature", 0], "--global_temperature 0.0: must be at least 1e-06"),
        (["--global_temperature", 2, "--temperature", 2], "must be given without --temperature"),
        (["--global_temperature", 2, "--particles", 0], "--particles 0: must be at least --num_samples"),
        (["--max_new_tokens", 2100], "--max_new_tokens 2100: needs 21"),
        (["--prompts", "missing.txt"], "missing.txt: no such file"),
        (["--chat"], "tokenizer has no chat template"),
    ],
)
def test_sample_with_bad_flags(refused, tiny_model_folder, data, tmp_path, flags, fragment):
    out = tmp_path / "samples" / "out.jsonl"
    good = ["--model", tiny_model_folder, "--prompts", data, "--out_file", out, *SAMPLE]
    refused(sample, [*good, *flags], fragment)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [(b"\n \n", "prompts.txt: the file is empty"), (b"caf\xe9\n", "prompts.txt:1: not UTF-8 text")],
)
def test_sample_with_a_bad_text_file(refused, tiny_model_folder, tmp_path, text, fragment):
    (tmp_path / "prompts.txt").write_bytes(text)
    refused(sample, ["--model", tiny_model_folder, "--prompts", tmp_path / "prompts.txt", *SAMPLE], fragment)


def test_sample_from_a_model_that_gives_no_numbers(refused, model, data, tmp_path):
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: t * float("nan") for name, t in tensors.items()}, model / "model.safetensors", {"format": "pt"}
    )
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    refused(
        sample, ["--model", model, "--prompts", data, "--out_file", out, *SAMPLE, "--overwrite"], "are NaN"
    )
    assert out.read_text() == "old\n" and not list(tmp_path.glob("*flags*"))


def test_sample_from_an_unfinished_run(refused, data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    flags = ["--model", run, "--prompts", data, *SAMPLE]
    refused(sample, flags, f"--model {run}: the run is unfinished; train with --resume to finish it")
    assert [path.name for path in run.iterdir()] == ["run.json"]


def damage_config(folder):
    truncate(folder / "adapter_config.json")


def damage_kind(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def damage_start(folder):
    edit_config(folder, init_lora_weights="pissa")  # such adapters go with a changed base


def damage_base_into_itself(folder):
    edit_config(folder, base_model_name_or_path=str(folder))


def damage_base(folder):
    edit_config(folder, base_model_name_or_path=str(folder / "moved"))


def damage_rank(folder):
    edit_config(folder, r=3)


def damage_rank_type(folder):
    edit_config(folder, r="two")


def damage_rank_bool(folder):
    edit_config(folder, r=True)


def damage_rank_size(folder):
    edit_config(folder, r=10**19)


def damage_alpha(folder):
    edit_config(folder, lora_alpha=float("inf"))


def damage_base_name(folder):
    edit_config(folder, base_model_name_or_path="a\0b")


def damage_base_unicode(folder):
    edit_config(folder, base_model_name_or_path="\ud800")


def damage_depth(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)


def damage_base_into_a_circle(folder):
    shutil.copytree(folder, folder.parent / "other")
    edit_config(folder, base_model_name_or_path=str(folder.parent / "other"))
    edit_config(folder.parent / "other", base_model_name_or_path=str(folder))


def damage_dtype(folder, dtype=torch.float8_e4m3fn):
    path = folder / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)


def damage_dtype_complex(folder):
    damage_dtype(folder, torch.complex64)


def damage_weights(folder):
    truncate(folder / "adapter_model.safetensors")


def lose_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def edit_config(folder, **values):
    """Change keys of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (damage_config, ["adapter_config.json: not a LoRA adapter's configuration"]),
        (damage_kind, ["adapter_config.json: only plain LoRA adapters are read"]),
        (damage_start, ["adapter_config.json: only plain LoRA adapters are read"]),
        (damage_base_into_itself, ["--model ", "names no other model"]),
        (damage_base, ["--model ", "moved: cannot be loaded"]),
        (
            damage_rank,
            ["adapter_model.safetensors: ", "lora_A.weight is (2, 64), but its configuration has r 3"],
        ),
        (damage_rank_type, ["adapter_config.json: r must be a positive whole number"]),
        (damage_rank_bool, ["adapter_config.json: r must be a positive whole number"]),
        (
            damage_rank_size,
            ["adapter_model.safetensors: ", "but its configuration has r 10000000000000000000"],
        ),
        (damage_alpha, ["adapter_config.json: ", "lora_alpha a positive number"]),
        (damage_base_name, ["--model ", "names no other model"]),
        (damage_base_unicode, ["adapter_config.json: not a LoRA adapter's configuration"]),
        (damage_depth, ["adapter_config.json: not a LoRA adapter's configuration", "nested too deeply"]),
        (damage_base_into_a_circle, ["--model ", "names no other model"]),
        (damage_dtype, ["adapter_model.safetensors: ", "float8_e4m3fn; only floats of 16, 32 or 64 bits"]),
        (
            damage_dtype_complex,
            ["adapter_model.safetensors: ", "complex64; only floats of 16, 32 or 64 bits"],
        ),
        (damage_weights, ["adapter_model.safetensors: cannot be read"]),
        (lose_weights, ["adapter_model.safetensors: cannot be read"]),
    ],
)
def test_sample_with_a_damaged_adapter(refused, adapter, data, tmp_path, damage, fragments):
    damage(adapter)
    out = tmp_path / "samples" / "out.jsonl"
    refused(
        sample, ["--model", adapter, "--prompts", data, "--out_file", out, *SAMPLE], str(adapter), *fragments
    )
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({}, "samples.jsonl: no such file"),
        ({"--samples": "DATA"}, "good.jsonl:1: needs string 'prompt' and 'completion'"),
        ({"--alpha": "-1"}, "--alpha"),
        ({"--alpha": "nan"}, "--alpha"),
        ({"--alpha": "abc"}, "argument --alpha: invalid float value: 'abc'"),
        ({"--aplha": "1"}, "--aplha"),
    ],
)
def test_evaluate_with_bad_input(refused, tmp_path, data, flags, fragment):
    if "--alpha" in flags:
        (tmp_path / "samples.jsonl").write_bytes(lines({"prompt": "a", "completion": "b"}))
    flags = {
        "--samples": tmp_path / "samples.jsonl",
        "--alpha": 0.2,
        "--out_file": tmp_path / "o" / "o.json",
    } | flags
    words = [data if word == "DATA" else word for flag in flags.items() for word in flag]
    refused(evaluate, ["society", *words], fragment)
    assert not (tmp_path / "o").exists()


DEEP = "[" * 500 + "]" * 500
SAMPLES = {
    "message without a role": lines({"messages": [{"content": "a"}, FIG]}),
    "message without content": lines({"messages": [{"role": "system"}, USER, FIG]}),
    "string among the messages": lines({"messages": ["a", USER, FIG]}),
    "content in parts": lines({"messages": [{**USER, "content": [{"type": "text", "text": "a"}]}, FIG]}),
    "no prompt": lines({"messages": [FIG]}),
    "nested too deep": f'{{"prompt": [{{"role": "user", "content": "a", "x": {DEEP}}}]}}\n'.encode(),
}


@pytest.mark.parametrize("rows", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("command", [["diversity"], ["judge", "--dry_run"], ["society"]])
def test_evaluate_with_bad_samples(refused, tmp_path, command, rows):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(lines({"prompt": "a", "completion": "b"}) + rows)
    refused(evaluate, [*command, "--samples", path], f"{path}:2: ")


def diversity(monkeypatch, folder, *flags):
    """What evaluate.py diversity writes of <folder>/samples.jsonl."""
    words = ["diversity", "--samples", folder / "samples.jsonl", "--out_file", folder / "out.json", *flags]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    return json.loads((folder / "out.json").read_text())["metrics"]


@pytest.mark.parametrize("text", ["\0", "\u200b", "a"])
def test_texts_of_one_word_have_no_pairs_of_words(tmp_path, monkeypatch, text):
    (tmp_path / "samples.jsonl").write_bytes(lines(*[{"prompt": "a", "completion": text}] * 4))
    result = diversity(monkeypatch, tmp_path)
    assert result["distinct-1"]["samples"]["mean"] == 1 / 4
    assert result["distinct-2"] == result["EAD-2"] == {}


@pytest.mark.parametrize(
    "command", [["diversity"], ["winrate", "--dry_run"], ["quality", "--reference", "there"]]
)
@pytest.mark.parametrize("flag", ["samples", "baseline", "out_file"])
def test_evaluate_with_an_empty_flag(refused, tmp_path, command, flag):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(lines({"prompt": "a", "completion": "b"}))
    flags = [*command, "--samples", path, "--baseline", path, f"--{flag}="]
    refused(evaluate, flags, f"--{flag}: is empty; give a value, or leave the flag out")


@pytest.mark.parametrize(
    "row",
    [{"key": "a", "answer": 5}, {"key": [1], "answer": "[[A]]"}, {"key": "a", "answer": None}, ["a"]],
)
def test_cache_of_other_rows(refused, tmp_path, row):
    samples, cache = tmp_path / "samples.jsonl", tmp_path / "cache.jsonl"
    samples.write_bytes(lines({"prompt": "a", "completion": "b"}))
    cache.write_bytes(lines({"key": "a", "answer": "[[A]]"}, row))
    flags = ["winrate", "--samples", samples, "--baseline", samples, "--cache", cache, "--dry_run"]
    refused(evaluate, flags, f"--cache {cache}:2: not an answer of a judge; give another file")


def test_cache_with_a_damaged_line(tmp_path, monkeypatch, capsys):
    """A line that is no JSON is what a killed run leaves: it is ignored, however deep its brackets are."""
    samples, cache = tmp_path / "samples.jsonl", tmp_path / "cache.jsonl"
    samples.write_bytes(lines({"prompt": "a", "completion": "b"}))
    cache.write_text("[" * 100_000 + "\n")
    flags = ["winrate", "--samples", samples, "--baseline", samples, "--cache", cache, "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    assert capsys.readouterr().out == "1 requests would be sent\n"


@pytest.mark.parametrize("name", ["none", "a list", "nested too deep"])
def test_sample_resumes_only_with_its_flags(refused, tiny_model_folder, data, tmp_path, name):
    out, texts = tmp_path / "out.jsonl", {"a list": "[]", "nested too deep": "[" * 100_000}
    out.write_text("old\n")
    if name in texts:
        Path(f"{out}.flags.json").write_text(texts[name])
    flags = ["--model", tiny_model_folder, "--prompts", data, "--out_file", out, "--resume", *SAMPLE]
    refused(sample, flags, f"{out}.flags.json: missing or damaged")
    assert out.read_text() == "old\n"


@pytest.mark.parametrize(
    ("script", "flags", "fragment"),
    [
        ("train_dpl.py", ["--data", "missing.jsonl", "--model", "MODEL"], "missing.jsonl: no such file"),
        (
            "evaluate.py",
            ["society", "--samples", "missing.jsonl", "--alpha", "1"],
            "missing.jsonl: no such file",
        ),
    ],
)
def test_as_a_user_sees_it(tiny_model_folder, tmp_path, script, flags, fragment):
    flags = [str(tiny_model_folder) if word == "MODEL" else word for word in flags]
    assert run_script(1, script, *flags, folders=[tmp_path]) == ([2], "", f"error: {fragment}\n")
    assert not any(tmp_path.iterdir())
