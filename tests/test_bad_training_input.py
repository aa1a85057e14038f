"""Whatever is wrong with the input: one line on stderr says what and where, exit code 2, no harm done."""

import gzip
import json
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

import sample
import train_dpl
import train_sft
from conftest import FIG, MUD, PAIR, PAIRS, USER, lines, truncate


def contents(folder):
    """Every file below a folder with its bytes, or None where there is no folder."""
    return (
        {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else None
    )


@pytest.fixture
def train_refused(refused, tiny_model_folder, data, tmp_path):
    """`refused` for train_dpl.py: flags override good ones, and the output folder stays as it was."""

    def run(flags, *fragments, script=train_dpl):
        out = tmp_path / "runs" / "run"
        before = contents(out)
        good = {"--model": tiny_model_folder, "--data": data, "--out_dir": out, "--lora_rank": 2}
        refused(
            script, [word for flag in (good | flags).items() for word in flag if word is not None], *fragments
        )
        assert contents(out) == before

    return run


ROWS = {
    "empty": (b"", "rows.jsonl: the file is empty"),
    "blank": (b"\n \n", "rows.jsonl: the file is empty"),
    "not UTF-8": (lines(PAIR) + b'{"prompt": "caf\xe9"}\n', "rows.jsonl:2: not UTF-8"),
    "not JSON": (lines(PAIR) + b"\n{'prompt': 1}\n", "rows.jsonl:3: not JSON"),
    "cut short": (lines(PAIR, PAIR)[:-9], "rows.jsonl:2: not JSON"),
    "nested too deep": (lines(PAIR) + b"[" * 200_000, "rows.jsonl:2: not JSON: nested too deeply"),
    "endless number": (b'{"prompt": ' + b"1" * 5000 + b"}", "rows.jsonl:1: not JSON"),
    "not an object": (lines(PAIR, ["a"]), "rows.jsonl:2: expected a JSON object, found list"),
    "key missing": (lines(PAIR, {"prompt": "a", "chosen": "b"}), "rows.jsonl:2: no key 'rejected'"),
    "no key at all": (lines({}), "rows.jsonl:1: no key 'chosen' (found none)"),
    "prompt is a number": (lines({**PAIR, "prompt": 3}), "rows.jsonl:1: 'prompt' must be a string"),
    "null completion": (
        lines({**PAIR, "chosen": None}),
        "rows.jsonl:1: ",
        "must both be strings, or both message lists",
    ),
    "mixed types": (
        lines({**PAIR, "chosen": [FIG]}),
        "rows.jsonl:1: ",
        "must both be strings, or both message lists",
    ),
    "empty completion": (
        lines(PAIR, {**PAIR, "rejected": ""}),
        "rows.jsonl:2: empty completion in 'rejected'",
    ),
    "half a surrogate": (lines(PAIR, {**PAIR, "chosen": "\ud83d"}), "rows.jsonl:2: not UTF-8"),
    "no Human and Assistant": (lines({"chosen": "a", "rejected": "b"}), "rows.jsonl:1: no 'prompt'"),
    "different questions": (
        lines({"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: c"}),
        "rows.jsonl:1: no 'prompt', and no shared prompt",
    ),
    "no shared message": (lines({"chosen": [FIG], "rejected": [MUD]}), "rows.jsonl:1: ", "no shared prompt"),
    "no message": (lines({"chosen": [], "rejected": []}), "rows.jsonl:1: ", "no shared prompt"),
    "no message in any": (lines({"prompt": [], "chosen": [], "rejected": []}), "rows.jsonl:1: ", "roles"),
    "roles out of order": (
        lines({"prompt": [USER, USER], "chosen": [FIG], "rejected": [MUD]}),
        "rows.jsonl:1: 'chosen': roles out of order: user, user, assistant",
    ),
    "user has the last word": (
        lines({"prompt": [USER, FIG], "chosen": [USER], "rejected": [USER]}),
        "rows.jsonl:1: 'chosen' must be one assistant message",
    ),
    "message without content": (
        lines({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [MUD]}),
        "rows.jsonl:1: 'chosen': a message needs a string 'role' and a string 'content'",
    ),
    "empty message": (
        lines({"prompt": [USER], "chosen": [FIG], "rejected": [{**MUD, "content": ""}]}),
        "rows.jsonl:1: empty completion in 'rejected'",
    ),
    "equal completions": (
        lines(*[{**PAIR, "chosen": " Mud."}] * 2),
        "rows.jsonl: no pair left of 2: dropped 2 with chosen equal to rejected",
    ),
}


@pytest.mark.parametrize(("text", "fragments"), [(t, f) for t, *f in ROWS.values()], ids=ROWS)
def test_bad_rows(train_refused, tmp_path, text, fragments):
    (tmp_path / "rows.jsonl").write_bytes(text)
    train_refused({"--data": tmp_path / "rows.jsonl"}, *fragments)


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("missing.jsonl", None, "missing.jsonl: no such file"),
        ("rows.doc", b"a,b\n", "rows.doc: unknown format"),
        (
            "cut.jsonl.gz",
            gzip.compress(lines(*PAIRS))[:-9],
            "cut.jsonl.gz: damaged or cut-short gzip file, after",
        ),
        ("plain.jsonl.gz", lines(PAIR), "plain.jsonl.gz: damaged or cut-short gzip file, after row 0"),
        ("object.json", b'{"data": []}', "object.json: expected a JSON list of objects, found dict"),
        ("half.json", b'[{"prompt":\n', "half.json:2: not JSON"),
        ("none.json", b"[]", "none.json: the file is empty"),
        ("rows.parquet", b"PAR1 not really", "rows.parquet: not a readable parquet file"),
    ],
)
def test_bad_files(train_refused, tmp_path, name, text, fragment):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if text is not None:
        (tmp_path / name).write_bytes(text)
    train_refused({"--data": tmp_path / name}, fragment)
    train_refused({"--eval_data": tmp_path / name}, fragment)


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"prompt": "a", "completion": ""}, "needs 'prompt' and a non-empty 'completion'"),
        ({"prompt": "a", "completion": [FIG]}, "needs 'prompt' and a non-empty 'completion'"),
        ({"messages": []}, "needs 'prompt' and a non-empty 'completion'"),
        ({"messages": [USER]}, "must be one assistant message"),
        ({"messages": [FIG]}, "roles out of order: assistant"),
        ({"prompt": [], "completion": []}, "roles out of order"),
        ({"messages": ["Hi"]}, "a message needs a string 'role'"),
    ],
)
def test_bad_supervised_rows(train_refused, tmp_path, row, fragment):
    (tmp_path / "rows.jsonl").write_bytes(lines({"prompt": "a", "completion": "b"}, row))
    train_refused({"--data": tmp_path / "rows.jsonl"}, "rows.jsonl:2: ", fragment, script=train_sft)


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({"--alpha": 0}, "--alpha 0.0: must be a positive number"),
        ({"--beta": -1}, "--beta -1.0: must be a positive number"),
        ({"--beta": "nan"}, "--beta nan: must be a positive number"),
        ({"--lr": "abc"}, "argument --lr: invalid float value: 'abc'"),
        ({"--learning_rate": "1"}, "unknown argument --learning_rate"),
        ({"--aplha": "0.3"}, "unknown argument --aplha; did you mean --alpha?"),
        ({"--batchsize=8": None}, "unknown argument --batchsize=8; did you mean --batch_size?"),
        ({"--max_length": 3}, "--max_length 3 is too small"),
        ({"--seed": 2**70}, f"--seed {2**70}: must be"),
        ({"--max_length": 0}, "--max_length 0: must be at least 1"),
        ({"--schedule": "steep"}, "--schedule steep: must be one of constant, linear, cosine"),
        ({"--overwrite": None, "--resume": None}, "--resume True: must be given without --overwrite"),
        ({"--lora_targets": "q_proj", "nope": None}, "--lora_targets nope: no such linear layer"),
        (
            {"--lora_targets": "nope"},
            "this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        ({"@missing.txt": None}, "missing.txt"),
        ({"--data": ""}, "--data: is empty; give a value, or leave the flag out"),
        ({"--eval_data": ""}, "--eval_data: is empty; give a value, or leave the flag out"),
        ({"--lora_targets": "q_proj", "": None}, "--lora_targets: is empty; give a value"),
    ],
)
def test_bad_flags(train_refused, flags, fragment):
    train_refused(flags, fragment)


def test_unbalanced_quote_in_a_file_of_flags(train_refused, tmp_path):
    (tmp_path / "recipe.txt").write_text("--data it's.jsonl\n")
    train_refused({f"@{tmp_path / 'recipe.txt'}": None}, "it's.jsonl", "No closing quotation")


def test_file_of_flags_that_names_itself(train_refused, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(f"--alpha 0.3\n@{two}\n")
    two.write_text(f"@{one}\n")
    train_refused({f"@{one}": None}, "an @file names itself")


def test_file_of_flags_with_a_nul(train_refused, tmp_path):
    (tmp_path / "flags.txt").write_text("--eval_data a\0b\n")
    train_refused({f"@{tmp_path / 'flags.txt'}": None}, "--eval_data: has a NUL character")


def test_file_of_flags_that_is_not_utf_8(train_refused, tmp_path):
    (tmp_path / "flags.txt").write_bytes(b"--alpha\n0.2\n# caf\xe9\n")
    train_refused({f"@{tmp_path / 'flags.txt'}": None}, "an @file is not UTF-8 text")


def test_messages_without_a_chat_template(train_refused, refused, tiny_model_folder, tmp_path):
    rows, out = tmp_path / "chat.jsonl", tmp_path / "samples" / "out.jsonl"
    rows.write_bytes(lines({"prompt": [USER], "chosen": [FIG], "rejected": [MUD]}))
    train_refused({"--data": rows}, "chat.jsonl: ", "tokenizer has no chat template")
    flags = ["--model", tiny_model_folder, "--prompts", rows, "--out_file", out]
    refused(sample, flags, "chat.jsonl: ", "tokenizer has no chat template")
    assert not out.parent.exists()
    rows.write_bytes(lines({"messages": [USER, FIG]}))
    train_refused({"--data": rows}, "chat.jsonl: ", "tokenizer has no chat template", script=train_sft)


def test_model_folder_that_is_not_there(train_refused, tmp_path):
    train_refused({"--model": tmp_path / "nowhere"}, f"--model {tmp_path / 'nowhere'}: ")


def test_model_folder_without_weights(train_refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    train_refused({"--model": model}, f"--model {model}: no *.safetensors weights there")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_model_file_cut_short(train_refused, model, name):
    truncate(model / name)
    train_refused({"--model": model}, f"--model {model}: cannot be loaded: ")


def test_model_whose_config_wants_another_shape(train_refused, model):
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    train_refused(
        {"--model": model}, f"--model {model}: ", "weights are missing or misshapen, first model.layers.2."
    )


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_model_with_quantized_weights(train_refused, model, quantization, kind):
    config = json.loads((model / "config.json").read_bytes()) | {"quantization_config": quantization}
    (model / "config.json").write_text(json.dumps(config))
    train_refused({"--model": model}, f"--model {model}: its weights are quantized ({kind}); give the unq")


def test_model_with_weights_that_are_no_numbers(train_refused, model):
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: t * float("nan") for name, t in tensors.items()}, model / "model.safetensors", {"format": "pt"}
    )
    train_refused({"--model": model}, f"--model {model}: ", "nan")


def test_rows_longer_than_the_model_s_positions(train_refused, model, tmp_path):
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    (tmp_path / "rows.jsonl").write_bytes(lines({**PAIR, "chosen": " The fig, the fig, the fig, the fig."}))
    train_refused(
        {"--model": model, "--data": tmp_path / "rows.jsonl"}, "--max_length 512: more positions than"
    )


def test_token_that_the_model_does_not_know(train_refused, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    (tmp_path / "rows.jsonl").write_bytes(lines(PAIR, {**PAIR, "prompt": "<new>"}))
    train_refused({"--model": model, "--data": tmp_path / "rows.jsonl"}, f"--model {model}: ", "token")


def test_run_is_kept_without_overwrite_or_resume(train_refused, adapter):
    train_refused({}, f"--out_dir {adapter}: holds a run; --resume continues it, --overwrite replaces it")


@pytest.mark.parametrize("flag", ["--overwrite", "--resume", "--seed=1"])
def test_folder_with_other_files_is_kept(train_refused, tmp_path, flag):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "thesis.tex").write_text("years of work")
    train_refused({flag: None}, "holds files that are no run; name another folder")


def test_file_in_the_place_of_a_folder_is_kept(train_refused, data):
    train_refused({"--out_dir": data, "--overwrite": None}, f"--out_dir {data}: is a file")


def test_output_below_a_file(train_refused, data):
    train_refused({"--out_dir": data / "run"}, data)


def test_bad_data_leaves_the_run_that_was_to_be_overwritten(train_refused, adapter, tmp_path):
    train_refused({"--data": tmp_path / "missing.jsonl", "--overwrite": None}, "missing.jsonl: no such file")


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ({"--alpha": 0.3}, "--alpha 0.3: the run to --resume had 0.2"),
        ({"--lora_rank": 4}, "--lora_rank 4: the run to --resume had 2"),
        ({"--max_steps": 1}, "--max_steps, --epochs: 1 steps, but the run to --resume is at 2"),
    ],
)
def test_resume_with_other_flags(train_refused, finished_run, adapter, flags, fragment):
    pairs = finished_run.parent / "pairs.jsonl"
    train_refused({"--data": pairs, "--alpha": 0.2, "--resume": None} | flags, fragment)


RUNS = {
    "nested too deep": ("[" * 100_000, "run.json: damaged; --overwrite starts the run anew"),
    "closed, but nested too deep": ('{"model": ' + "[" * 500 + "]" * 500 + "}", "run.json: damaged"),
    "a list": ("[]", "run.json: damaged"),
    "pairs": ('[["seed", 0]]', "run.json: damaged"),
    "half a surrogate": ('{"model": "\\ud800"}', "run.json: damaged"),
    "empty data": ('{"data": ""}', "--data: is empty"),
    "a NUL in the data": ('{"data": "a\\u0000b"}', "--data: has a NUL character"),
    "a list of data": ('{"data": []}', "--data: expected one argument"),
}


@pytest.mark.parametrize(("text", "fragment"), RUNS.values(), ids=RUNS)
def test_resume_with_a_damaged_run_json(refused, adapter, text, fragment):
    (adapter / "run.json").write_text(text)
    refused(train_dpl, ["--out_dir", adapter, "--resume"], fragment)
    assert (adapter / "run.json").read_text() == text


def test_resume_on_other_data(train_refused, data, adapter):
    data.write_bytes(lines(*PAIRS[:2]))
    train_refused({"--alpha": 0.2, "--resume": None}, f"--data {data}: not that of the run to --resume")


def test_resume_after_a_kill_in_the_middle_of_a_metrics_row(finished_run, adapter, monkeypatch):
    metrics = adapter / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in metrics.open()]
    with metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    monkeypatch.setattr(sys, "argv", ["train_dpl.py", "--resume", "--out_dir", str(adapter)])
    train_dpl.main()
    assert [json.loads(line)["step"] for line in metrics.open()] == steps


def test_loss_that_is_not_finite_stops_the_run(refused, tiny_model_folder, data, tmp_path):
    flags = ["--model", tiny_model_folder, "--data", data, "--out_dir", tmp_path / "run", "--lr", "1e30"]
    flags += ["--warmup_steps", 0]
    refused(train_dpl, [*flags, "--max_steps", 5], "step 1: the loss is NaN or infinite on pairs [")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("rank", "size"), [(0, "1104"), (16, "276")])
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(rank, size, train_refused, tmp_path):
    """A folder of 70 billion weights, of which only the configuration is there."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8).save_pretrained(tmp_path / "large")
    flags = {"--model": tmp_path / "large", "--lora_rank": rank}
    train_refused(
        flags, f"large: training needs about {size}", "GB without activations, and each process has"
    )
