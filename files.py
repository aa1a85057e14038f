"""Flags, rows of data, atomic writes and digests; every bad input ends in one line on stderr.

Rows are read from .jsonl[.gz], .json, .parquet, .csv and .txt files. Files are written atomically: under a
temporary name that is then renamed, so that a reader never sees half a file and an interrupted run leaves the
old file as it was.
"""

import argparse
import contextlib
import csv
import difflib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import field, fields
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from transformers import HfArgumentParser

Config = TypeVar("Config")
MAX_DEPTH = 100  # of nested JSON
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "bool": "BOOL",
}
SAFETENSORS_DTYPES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}


class InputError(Exception):
    """The user's input is wrong. The message names the file, row or flag and says what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main(). An InputError is printed as one line on stderr, with exit code 2.

    Ctrl-C prints "interrupted". Once main() has ended, a script that gets another one dies of it in silence.
    """
    try:
        try:
            main()
        finally:
            # Python takes a good part of a second to exit, in which a KeyboardInterrupt would be a traceback
            is_script = main.__module__ == "__main__"  # if not, this process goes on
            if is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except (InputError, OSError) as error:  # OSError: disk full, no permission, a folder in a file's place
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all of torchrun's processes read the same bad flags
            print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def print_error(error: Exception) -> None:
    """Print an exception's message as one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def raise_input_error(message: str) -> NoReturn:
    """Replacement for ArgumentParser.error, which would print the usage and exit."""
    raise InputError(message)


@contextlib.contextmanager
def error_prefix(path: str | Path) -> Iterator[None]:
    """Put the name of a file in front of the message of any InputError raised in the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# ---- flags


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows a docstring with its own line breaks, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def flag(default: Any, help: str) -> Any:
    """A dataclass field that parse() turns into a command-line flag with this default and help text."""
    return field(default=default, metadata={"help": help})


def require(config: Any, name: str, condition: bool, wanted: str) -> None:
    """Raise InputError("--name value: must be `wanted`") unless `condition` is true."""
    if not condition:
        raise InputError(f"--{name} {getattr(config, name)}: must be {wanted}")


def require_new(config: Any, *names: str) -> None:
    """Raise InputError if a file that one of the flags `names` names exists, unless --overwrite is given."""
    for name in names:
        path = getattr(config, name)
        if path and Path(path).exists() and not config.overwrite:
            raise InputError(f"--{name} {path}: exists; --overwrite replaces it")


def require_same(flags: dict[str, Any], saved: dict[str, Any], may_change: set[str]) -> None:
    """Raise InputError for the first flag that differs from the run being resumed, unless it may change."""
    for name, value in flags.items():
        before = saved.get(name, value)
        if name not in may_change and before != value:
            raise InputError(f"--{name} {value}: the run to --resume had {before}; give the same")


def parse(config: type[Config], description: str | None, args: list[str] | None = None) -> Config:
    """Read a config dataclass from the command line and from @files (flags with values, # comments).

    `args` are the command line's arguments unless given. If the dataclass has a class method
    `default_args(args)`, the arguments that it returns are read before those of the command line. A path
    below data/ that the working directory lacks is the project's own. Raises InputError for anything that
    cannot be read, and for an empty string, such as an unset $VARIABLE gives, unless the dataclass's class
    attribute `may_be_empty` names the flag.
    """

    def split(line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"the line {line!r} of an @file: {error}") from None

    parser = HfArgumentParser(
        config, description=description, formatter_class=Help, fromfile_prefix_chars="@", allow_abbrev=False
    )
    parser.error = raise_input_error
    parser.convert_arg_line_to_args = split
    try:
        " ".join(sys.argv).encode()
        argv = sys.argv[1:] if args is None else args
        if hasattr(config, "default_args"):
            argv = config.default_args(parser.parse_known_args(argv)[0]) + argv
        for name, value in vars(parser.parse_known_args(argv)[0]).items():
            texts = value if isinstance(value, list) else [value]
            if "" in texts and name not in getattr(config, "may_be_empty", ()):
                raise InputError(f"--{name}: is empty; give a value, or leave the flag out")
            if any(isinstance(text, str) and "\0" in text for text in texts):  # no file can have such a name
                raise InputError(f"--{name}: has a NUL character")
        values, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UnicodeError:
        raise InputError("the command line or an @file is not UTF-8 text") from None
    except RecursionError:
        raise InputError("an @file names itself, or too many others") from None
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, [f"--{field.name}" for field in fields(config)], 1)
        advice = f"did you mean {close[0]}?" if close else "--help lists the flags"
        raise InputError(f"unknown argument {unknown[0]}; {advice}")
    for name, value in vars(values).items():
        if isinstance(value, str) and value.startswith("data/") and not Path(value).exists():
            own = Path(__file__).parent / value
            setattr(values, name, str(own) if own.exists() else value)
    return values


# ---- reading


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:row", row) for each JSON object of a .jsonl, .jsonl.gz, .json or .parquet file.

    A .json file holds one list, or JSON lines. A line of a .txt file becomes {"prompt": line}. The first line
    of a .csv file names its columns. Rows are counted from 1; in JSON lines and .txt files a row's number is
    its line number. Raises InputError for a file that is missing, empty, truncated, not UTF-8 or not JSON,
    and for a row that is not an object.
    """
    path, count = Path(path), 0
    require_file(path)
    for number, row in _parse(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row
        count += 1
    if not count:
        raise InputError(f"{path}: the file is empty")


def require_file(path: str | Path) -> None:
    """Raise InputError unless `path` is a file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")


def read_template(path: str | Path, *placeholders: str) -> str:
    """A text file with {placeholders}, without its last newline. Raises InputError if one is missing."""
    require_file(path)
    try:
        template = Path(path).read_text(encoding="utf-8").rstrip("\n")
    except UnicodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    for placeholder in placeholders:
        if f"{{{placeholder}}}" not in template:
            raise InputError(f"{path}: the placeholder {{{placeholder}}} is missing; add it")
    return template


def fill(template: str, **values: str) -> str:
    """Replace each {name} by values[name], in one pass: braces inside a value stay as they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def parse_json(text: str | bytes) -> Any:
    """A JSON document's value. Raises ValueError for no JSON, no UTF-8, and lists nested beyond MAX_DEPTH.

    Python reads deeper ones, but fails to copy, write or render them with a RecursionError.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
        level = [value] if text.count("[") + text.count("{") > MAX_DEPTH else []
        for _ in range(MAX_DEPTH):
            children = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
            level = [child for some in children for child in some]
    except RecursionError:
        level = [text]
    if level:
        raise ValueError("nested too deeply")
    if "\\ud" in text.lower():  # half a surrogate pair is valid JSON but cannot be encoded as UTF-8
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file begins with a line that is a whole JSON object, and goes on."""
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        lines = filter(bytes.strip, file)
        return isinstance(json.loads(next(lines, b"")), dict) and any(lines)
    return False


def _parse(path: Path) -> Iterator[tuple[int, Any]]:
    name, number = path.name, 0
    try:
        is_lines = name.endswith((".jsonl", ".jsonl.gz", ".txt"))
        if is_lines or (name.endswith(".json") and _is_json_lines(path)):
            with (gzip.open if name.endswith(".gz") else open)(path, "rb") as lines:
                for number, line in enumerate(lines, 1):  # bytes: a decoding error then names its own row
                    text = line.decode("utf-8-sig")
                    if text.strip():
                        is_text = name.endswith(".txt")
                        yield number, {"prompt": text.rstrip("\r\n")} if is_text else parse_json(text)
        elif name.endswith(".json"):
            text = path.read_bytes().decode("utf-8-sig")
            rows = parse_json(text) if text.strip() else []
            if not isinstance(rows, list):
                raise InputError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")
            yield from enumerate(rows, 1)
        elif name.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as lines:
                try:
                    yield from enumerate(csv.DictReader(lines, strict=True), 1)
                except csv.Error as error:
                    raise InputError(f"{path}: not readable as csv: {error}") from None
        elif name.endswith(".parquet"):
            try:
                import pyarrow.parquet
            except ImportError:
                raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
            try:
                rows = pyarrow.parquet.read_table(path, page_checksum_verification=True).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{path}: not a readable parquet file: {error}") from None
            yield from enumerate(rows, 1)
        else:
            raise InputError(f"{path}: unknown format; use .jsonl, .jsonl.gz, .json, .parquet, .csv or .txt")
    except UnicodeError:
        raise InputError(f"{path}:{max(number, 1)}: not UTF-8 text") from None
    except ValueError as error:  # not JSON, or an integer with too many digits for Python
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{path}:{number or getattr(error, 'lineno', 1)}: not JSON: {reason}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: damaged or cut-short gzip file, after row {number}") from None


# ---- writing


def is_writable(path: str | Path) -> bool:
    """Whether files can be made at or below a path that need not exist yet."""
    above = next(path for path in (Path(path), *Path(path).resolve().parents) if path.exists())
    return above.is_dir() and os.access(above, os.W_OK)


_locks: list[IO] = []


def lock(path: str | Path) -> None:
    """Hold a file `path` as a lock until release_locks() or the end of this process, however it ends.

    A scheduler may start a job again while the old one still ends. Raises InputError if another process has
    the lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = path.read_text() or "another process"
        raise InputError(f"{path.parent}: {owner} writes there: wait until it ends, or end it") from None
    if not os.fstat(file.fileno()).st_nlink:  # released, and so removed, between open() and flock()
        return lock(path)
    _locks.append(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}, started at {time.time():.0f}")
    file.flush()


def release_locks() -> None:
    """Release what lock() holds."""
    while _locks:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_locks[-1].name)
        _locks.pop().close()


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path`; at the end of the block it is flushed to disk and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON document, atomically. NaN and infinity become null: JSON has no such numbers."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, atomically; returns its SHA-256.

    Equal tensors, with equal metadata in equal order, give equal bytes.
    """
    sha256 = hashlib.sha256()
    with atomic_write(path, "wb") as file:
        for part in _safetensors(tensors, metadata):
            file.write(part)
            sha256.update(part)
    return sha256.hexdigest()


def _safetensors(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file, a tensor at a time. safetensors.torch.save would copy them all twice.

    The file: 8 bytes for the length of the header; the header, JSON, padded to a multiple of 8; the values.
    """
    from torch import uint8  # imported here: scripts that only read rows start without torch

    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().reshape(-1).view(uint8).numpy().data


# ---- digests


def digest_tensors(tensors: dict[str, Any]) -> str:
    """SHA-256 of tensors' names, shapes, dtypes and values."""
    sha256 = hashlib.sha256()
    for part in _safetensors(tensors):
        sha256.update(part)
    return sha256.hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            sha256.update(block)
    return sha256.hexdigest()
