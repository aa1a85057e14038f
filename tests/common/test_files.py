"""Rows in, whole files out, flags from the command line."""

import gzip
import hashlib
import json
import re
import signal
import subprocess
import sys
from array import array
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from common.files import (
    MAX_DEPTH,
    ROOT,
    InputError,
    atomic_write,
    digest_json,
    parse_json,
    write_json,
    write_tensors,
)
from common.flags import Flags, flag, parse, run_command
from common.rows import read_rows


@dataclass
class Config:
    """Flags of each type."""

    name: str = flag("none", "A text.")
    size: int = flag(1, "A whole number.")
    fast: bool = flag(False, "A switch.")
    layers: list[str] | None = flag(None, "A list.")


@dataclass
class Sizes(Flags):
    """A list whose values are bounded."""

    sizes: list[int] | None = flag(None, "Sizes.", "[1, inf)")


def test_each_value_of_a_list_must_be_allowed():
    assert parse(Sizes, None, []).sizes is None
    assert parse(Sizes, None, ["--sizes", "1", "2"]).sizes == [1, 2]
    with pytest.raises(InputError, match=r"^--sizes 0: must be at least 1$"):
        parse(Sizes, None, ["--sizes", "1", "0"])


def test_a_fork_may_have_plain_fields():
    @dataclass
    class Forked(Sizes):
        gamma: float = 0.5

    assert parse(Forked, None, ["--gamma", "2"]).gamma == 2


def test_running_out_of_gpu_memory_is_one_line(refused):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    refused(SimpleNamespace(__name__="some", main=main), [], "CUDA out of memory: a smaller batch needs less")


def parse_arguments(*arguments):
    """What parse() makes of a command line."""
    return parse(Config, None, list(map(str, arguments)))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)


@given(
    st.recursive(
        SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=2), x, max_size=3)
    )
)
def test_a_digest_taken_in_pieces_is_that_of_the_whole_json(value):
    assert digest_json(value) == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_tuples_and_arrays_have_the_digest_of_lists():
    assert digest_json(["a", [(array("i", [1, 2]), [])]]) == digest_json(["a", [[[1, 2], []]]])


@given(
    st.dictionaries(
        # __metadata__ is the format's own: with a tensor of that name, safetensors writes what it cannot read
        st.text(min_size=1).filter(lambda name: name.isprintable() and name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_write_tensors_writes_what_safetensors_would(tmp_path_factory, shapes):
    """The same bytes, one tensor at a time; transposed ones too."""
    path = tmp_path_factory.mktemp("tensors") / "file"
    tensors = {
        name: torch.randint(9, shape).to(dtype).mT if len(shape) > 1 else torch.randint(9, shape).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    digest = write_tensors(path, tensors, {"key": "é"})
    data = path.read_bytes()
    assert data == save({name: x.contiguous() for name, x in tensors.items()}, {"key": "é"})
    assert digest == hashlib.sha256(data).hexdigest()


def test_atomic_write_replaces_the_file(tmp_path):
    path = tmp_path / "new folder" / "file"
    for text in ("old\n", "néw\n"):
        with atomic_write(path) as file:
            file.write(text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"é": torch.randn(3, 5), "b": torch.arange(2)}
    metadata = {"ü": "0"}
    assert len({write_tensors(path, tensors, metadata) for _ in range(32)}) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_when_interrupted(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_keeps_the_old_file_when_the_value_is_no_json(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"naïve": [1]})
    with pytest.raises(TypeError):
        write_json(path, object())
    assert path.read_text(encoding="utf-8") == '{\n "naïve": [\n  1\n ]\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("zipped", [False, True])
@given(gaps=st.lists(st.sampled_from([b"", b"  ", b"\t\r"]), max_size=4), ends=st.booleans())
def test_rows_are_counted_as_an_editor_counts_lines(tmp_path_factory, zipped, gaps, ends):
    lines = [b'{"a": 1}', *gaps, '{"a": "line\u2028separator"}'.encode()]
    data = b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n" * ends
    path = tmp_path_factory.mktemp("rows") / ("rows.jsonl.gz" if zipped else "rows.jsonl")
    path.write_bytes(gzip.compress(data) if zipped else data)
    expected = [(f"{path}:1", {"a": 1}), (f"{path}:{len(lines)}", {"a": "line\u2028separator"})]
    assert list(read_rows(path)) == expected


@pytest.mark.parametrize("start", [b"", b"\n", b"\xef\xbb\xbf"])
def test_json_lines_in_a_json_file_are_read(tmp_path, start):
    path = tmp_path / "rows.json"
    path.write_bytes(start + '{"a": "é"}\r\n\n{"a": [1]}'.encode())
    first = 1 + start.count(b"\n")
    assert list(read_rows(path)) == [(f"{path}:{first}", {"a": "é"}), (f"{path}:{first + 2}", {"a": [1]})]
    path.write_bytes(start + b'{"a": 1}\n{"a": ')
    with pytest.raises(InputError, match=rf"rows\.json:{first + 1}: not JSON"):
        list(read_rows(path))
    path.write_bytes(start + b'[{"a": 1},\n{"a": 2}]')
    assert [row for _, row in read_rows(path)] == [{"a": 1}, {"a": 2}]


def test_flags_come_from_files_with_comments(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(
        "# a recipe: it's whole\n\n--size 2  # why\n--name 'two words'\n--layers q_proj k_proj\n"
    )
    found = parse_arguments(f"@{recipe}", "--fast")
    assert found == Config(name="two words", size=2, fast=True, layers=["q_proj", "k_proj"])
    assert parse_arguments(f"@{recipe}", "--size", "3").size == 3  # the later flag wins
    assert parse_arguments() == Config()


def test_rows_of_a_csv_file(tmp_path):
    text = 'id,text,"a, b"\n1,"He said ""fig"",\r\nthen left",\n2,café,"x\n\ny"\n'
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.csv").write_bytes(text.encode(encoding))
        assert [*read_rows(tmp_path / "a.csv")] == [
            (f"{tmp_path}/a.csv:1", {"id": "1", "text": 'He said "fig",\r\nthen left', "a, b": ""}),
            (f"{tmp_path}/a.csv:2", {"id": "2", "text": "café", "a, b": "x\n\ny"}),
        ]


def test_an_empty_flag_is_refused_unless_it_may_be_empty():
    for words in (["--name="], ["--name", ""], ["--layers", "a", ""]):
        with pytest.raises(InputError, match=re.escape(f"{words[0].strip('=')}: is empty")):
            parse_arguments(*words)
    assert parse(Config, None, ["--name="], may_be_empty=("name",)).name == ""
    with pytest.raises(InputError, match="--layers: is empty"):
        parse(Config, None, ["--layers="], may_be_empty=("name",))


@given(st.integers(0, 2 * MAX_DEPTH), st.sampled_from(['{"a":%s}', "[0,%s]"]))
def test_json_is_read_to_a_depth_that_all_of_python_can_handle(depth, form):
    text = "1"
    for _ in range(depth):
        text = form % text
    if depth <= MAX_DEPTH:
        assert parse_json(text) == parse_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)


def test_many_brackets_that_are_not_nested():
    value = [[["[" * 1000, {"a": []}]] * 200, {"b": "{" * 1000}]
    assert parse_json(json.dumps(value)) == value


# Ctrl-C comes once main() is over, as it may while Python unloads torch
LATE = """
import atexit, os, signal, sys
from common.files import InputError
from common.flags import run_command
signal.signal(signal.SIGINT, {handler})  # a shell's background jobs ignore Ctrl-C
atexit.register(lambda: print("finished", flush=True))
atexit.register(os.kill, os.getpid(), signal.SIGINT)
def main():
    {action}
run_command(main)
"""


@pytest.mark.parametrize(
    ("handler", "action", "code", "error"),
    [
        ("signal.default_int_handler", "pass", -signal.SIGINT, ""),
        ("signal.default_int_handler", "sys.exit(3)", -signal.SIGINT, ""),
        ("signal.default_int_handler", "raise KeyboardInterrupt", -signal.SIGINT, "interrupted\n"),
        ("signal.default_int_handler", "raise InputError('bad')", -signal.SIGINT, "error: bad\n"),
        ("signal.SIG_IGN", "pass", 0, ""),
        ("signal.SIG_IGN", "raise InputError('bad')", 2, "error: bad\n"),
    ],
)
def test_an_interrupt_after_the_end_is_silent(handler, action, code, error):
    script = LATE.format(handler=handler, action=action)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == ("" if code == -signal.SIGINT else "finished\n")


def test_run_command_leaves_the_handlers_of_a_caller_that_goes_on():
    before = signal.getsignal(signal.SIGINT)
    run_command(lambda: None)
    with pytest.raises(SystemExit):
        run_command(lambda: (_ for _ in ()).throw(InputError("bad")))
    assert signal.getsignal(signal.SIGINT) is before
