"""Damaged inputs by the hundred: each is refused in one line with code 2, or seen and made anew.

A flipped bit may leave the meaning whole (a JSON exponent's e, a gzip header's date): nothing changes then.
"""

import gzip
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import checkpoints, newest_checkpoint
from common.files import digest_json
from common.flags import parse, run_command
from core.hub import load_model
from core.pairs import load_pairs, tokenize
from core.reference import reference_stats
from scripts import run_dpl
from tiny import lines
from train_dpl import DPLConfig

PAIRS = [{"prompt": f"Fruit {i}?", "chosen": " The fig.", "rejected": f" Mud {i}."} for i in range(8)]
ROWS = lines(*PAIRS)


def cut(data, draw):
    """The start of a file."""
    return data[: draw.randrange(len(data))]


def flip(data, draw):
    """A file with one bit turned over."""
    where = draw.randrange(len(data))
    return data[:where] + bytes([data[where] ^ 1 << draw.randrange(8)]) + data[where + 1 :]


def blank(data, draw):
    """A file with a stretch of zeros, as a disk that lost a block leaves it."""
    where = draw.randrange(len(data))
    size = min(len(data) - where, 64)
    return data[:where] + bytes(size) + data[where + size :]


DAMAGES = [(damage, seed) for damage in (cut, flip, blank) for seed in range(12)]
everywhere = pytest.mark.parametrize("damage, seed", DAMAGES, ids=[f"{d.__name__}{s}" for d, s in DAMAGES])


@pytest.fixture(scope="module")
def run(tiny_model_folder, tmp_path_factory):
    """A finished run of four steps with its checkpoints of steps 2 and 4, and its reference cache."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "rows.jsonl").write_bytes(ROWS)
    config = DPLConfig(model=str(tiny_model_folder), data=str(folder / "rows.jsonl"))
    config.out_dir, config.lora_rank, config.max_steps, config.save_every = str(folder / "run"), 2, 4, 2
    run_dpl(config)
    return folder


@pytest.fixture
def outcome(capsys):
    """What a function gives, or None if it was refused as it must be: one line on stderr and code 2."""

    def of(function):
        found = []
        capsys.readouterr()
        try:
            run_command(lambda: found.append(function()))
        except SystemExit as left:
            error = capsys.readouterr().err
            assert left.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            return None
        return found[0]

    return of


def reread(path):
    """The rows of an undamaged or differently worded file, by other means than the project's."""
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").ParquetFile(path).read().to_pylist()
    text = path.read_bytes().decode()
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, filter(None, text.split("\n")))
    return [{key: row.get(key) for key in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
@everywhere
def test_data(outcome, tiny_model_folder, tmp_path, name, damage, seed):
    path, tokenizer = tmp_path / name, load_model(tiny_model_folder)[1]
    if name == "rows.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:
        text = json.dumps(PAIRS).encode() if name == "rows.json" else ROWS
        path.write_bytes(gzip.compress(text) if name == "rows.jsonl.gz" else text)
    whole = load_pairs(str(path), tokenizer, 64)
    path.write_bytes(damage(path.read_bytes(), random.Random(seed)))
    found = outcome(lambda: load_pairs(str(path), tokenizer, 64))
    if found and name == "rows.jsonl.gz":  # the one format with a checksum
        assert found == whole
    elif found:  # other text may be as good: then it is the text that is there
        assert found == tokenize(reread(path), tokenizer, 64)
        if damage is cut:
            assert name == "rows.jsonl" and found == whole[: len(found)]


@pytest.mark.parametrize("name", ["state.json", "state-0-of-1.safetensors"])
@everywhere
def test_checkpoint(outcome, capsys, run, tmp_path, name, damage, seed):
    folder = shutil.copytree(run / "run", tmp_path / "run") / "checkpoint"
    before, newest = checkpoints(folder)
    whole, draw = json.loads((newest / "state.json").read_bytes()), random.Random(seed)
    (newest / name).write_bytes(damage((newest / name).read_bytes(), draw))
    path, state = newest_checkpoint(folder)
    warning = capsys.readouterr().err
    if path == newest:
        assert whole == state | {"sha256": whole["sha256"]} and not warning
        return
    assert path == before and warning.startswith(f"warning: {newest}: damaged") and warning.count("\n") == 1
    shutil.rmtree(before)
    assert outcome(lambda: newest_checkpoint(folder)) is None


def edit_state(path, **changes):
    state = json.loads((path / "state.json").read_bytes())
    (path / "state.json").write_text(json.dumps(state | changes))


def forge_state(path, *lost, **changes):
    """Edit a checkpoint's state.json so that its digest is right."""
    state = json.loads((path / "state.json").read_bytes()) | changes
    state = {key: value for key, value in state.items() if key not in (*lost, "sha256")}
    (path / "state.json").write_text(json.dumps({**state, "sha256": digest_json(state)}))


def edit_tensors(path, change):
    file = path / "state-0-of-1.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file)


EDITS = {
    "another step": lambda path: edit_state(path, step=3),
    "no files": lambda path: edit_state(path, files={}),
    "another seed": lambda path: edit_state(path, config={"seed": 1}),
    "a list": lambda path: (path / "state.json").write_text("[]"),
    "null": lambda path: (path / "state.json").write_text("null"),
    "files as a list": lambda path: edit_state(path, files=["state-0-of-1.safetensors"]),
    "nested too deep": lambda path: (path / "state.json").write_text("[" * 100_000),
    "forged: another step": lambda path: forge_state(path, step=-1),
    "forged: a step that is text": lambda path: forge_state(path, step="4"),
    "forged: half a step": lambda path: forge_state(path, step=4.5),
    "forged: no step": lambda path: forge_state(path, "step"),
    "forged: no model": lambda path: forge_state(path, "model"),
    "forged: no files": lambda path: forge_state(path, files={}),
    "forged: a list of files": lambda path: forge_state(path, files=[]),
    "forged: another file": lambda path: forge_state(path, files={"state.json": "0"}),
    "no state": lambda path: (path / "state.json").unlink(),
    "no tensors": lambda path: (path / "state-0-of-1.safetensors").unlink(),
    "nothing": lambda path: shutil.rmtree(path) or path.mkdir(),
    "another dtype": lambda path: edit_tensors(path, torch.Tensor.half),
    "other shapes": lambda path: edit_tensors(path, lambda tensor: tensor[None]),
    "the one before": lambda path: shutil.copy(path.parent / "000002" / "state-0-of-1.safetensors", path),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_checkpoint(run, tmp_path, edit):
    folder = shutil.copytree(run / "run", tmp_path / "run") / "checkpoint"
    before, newest = checkpoints(folder)
    edit(newest)
    assert newest_checkpoint(folder)[0] == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@everywhere
def test_adapter(outcome, run, tmp_path, name, damage, seed):
    folder = shutil.copytree(run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    wanted = load_model(folder)[0].state_dict()
    (folder / name).write_bytes(damage((folder / name).read_bytes(), random.Random(seed)))
    found = outcome(lambda: load_model(folder))
    if found:
        tensors = found[0].state_dict()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("seed", range(8))
def test_model_cut_short(outcome, tiny_model_folder, tmp_path, name, seed):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / name).write_bytes(cut((folder / name).read_bytes(), random.Random(seed)))
    assert outcome(lambda: load_model(folder)) is None


@everywhere
def test_cache(run, tiny_model_folder, tmp_path, damage, seed):
    model, tokenizer = load_model(tiny_model_folder)
    pairs = load_pairs(str(run / "rows.jsonl"), tokenizer, 64)
    wanted = reference_stats(model, pairs, tmp_path, 500)
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes(), random.Random(seed)))
    found = reference_stats(model, pairs, tmp_path, 500)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


WHOLE = ["batch_size", "micro_batch_tokens", "max_length", "log_every", "eval_every", "save_every", "keep"]
WHOLE += ["lora_rank", "max_steps", "warmup_steps", "seed"]
REAL = ["lr", "lora_alpha", "epochs", "alpha", "beta", "lora_dropout", "max_grad_norm"]
WORDS = ["schedule", "optimizer", "dtype", "parallel", "overwrite", "wandb"]
ARGUMENTS = [f"--{n}={v}" for n in WHOLE for v in ("", "x", "-1", "1.5", "1e3", "nan", "0x10")]
ARGUMENTS += [f"--{n}={v}" for n in REAL for v in ("", "x", "-1", "nan", "1,5")]
ARGUMENTS += [f"--{n}={v}" for n in WORDS for v in ("", "x", "-1", "nan")]
ARGUMENTS += ["--", "-x", "word", "--lora", "--alpha", "@nowhere.txt", "--parallel=fsdp"]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_argument(outcome, argument):
    assert outcome(lambda: parse(DPLConfig, None, [argument])) is None
