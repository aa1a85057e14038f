"""Reading rows, writing files whole, parsing flags, and a one-line message for every bad input.

Rows come from .jsonl, .jsonl.gz, .json, .parquet and .txt. A file is written under a temporary name and
renamed, so readers never see half of it and an interrupted run leaves the old one intact.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import IO, Any, TypeVar

from transformers import HfArgumentParser

Config = TypeVar("Config")


class InputError(Exception):
    """The user's input is at fault; the message names the file, row or flag and says what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main(); an InputError becomes one line on stderr and exit code 2."""
    try:
        main()
    except (InputError, OSError) as error:  # OSError: disk full, no permission, a folder in a file's place
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's processes all read the same bad flags
            complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def complain(error: Exception) -> None:
    """An error as one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def refuse(message: str) -> None:
    """Stands in for a parser's error(): raise an InputError instead of printing the usage."""
    raise InputError(message)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Prefix the message of an InputError raised inside with the file that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help keeps a docstring's own lines, and tells every flag's default."""


def flag(default: Any, help: str) -> Any:
    """A dataclass field that parse() turns into a command-line flag."""
    return field(default=default, metadata={"help": help})


def require(config: Any, name: str, holds: bool, wanted: str) -> None:
    """Raise InputError for the flag `name` unless `holds`; `wanted` completes "must be ..."."""
    if not holds:
        raise InputError(f"--{name} {getattr(config, name)}: must be {wanted}")


def require_same(flags: dict[str, Any], before: dict[str, Any], free: set[str]) -> None:
    """Raise InputError for the first flag not in `free` that differs from the run being resumed."""
    for name, value in flags.items():
        had = before.get(name, value)
        if name not in free and had != value:
            raise InputError(f"--{name} {value}: the run to --resume had {had}; give the same")


def parse(config: type[Config], description: str | None) -> Config:
    """Flags from the command line and from @files (flags with their values, # comments).

    Raises InputError for what it cannot read.
    """

    def split(line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"the line {line!r} of an @file: {error}") from None

    parser = HfArgumentParser(
        config, description=description, formatter_class=Help, fromfile_prefix_chars="@", allow_abbrev=False
    )
    parser.error = refuse
    parser.convert_arg_line_to_args = split
    try:
        " ".join(sys.argv).encode()
        values, unknown = parser.parse_args_into_dataclasses(
            return_remaining_strings=True, look_for_args_file=False
        )
    except UnicodeError:
        raise InputError("the command line or an @file is not UTF-8 text") from None
    if unknown:
        raise InputError(f"unknown argument {unknown[0]}; --help lists the flags")
    return values


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:row", row) for each JSON object of a .jsonl, .jsonl.gz, .json or .parquet file.

    A line of a .txt file is {"prompt": line}. Rows are counted from 1, as an editor counts lines. Raises
    InputError for a file that is missing, empty, cut short, not UTF-8 or not JSON, and for a row that is not
    an object.
    """
    path, count = Path(path), 0
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    for number, row in _parse(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row
        count += 1
    if not count:
        raise InputError(f"{path}: the file is empty")


def _loads(text: str) -> Any:
    value = json.loads(text)
    if "\\ud" in text.lower():  # a lone surrogate is valid JSON but no UTF-8 text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _parse(path: Path) -> Iterator[tuple[int, Any]]:
    name, number = path.name, 0
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if name.endswith(".gz") else open)(path, "rb") as lines:
                for number, line in enumerate(lines, 1):  # bytes: a decoding error then names its own row
                    if text := line.decode("utf-8-sig").strip():
                        yield number, _loads(text)
        elif name.endswith(".txt"):
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if (text := line.decode("utf-8-sig")).strip():
                        yield number, {"prompt": text.rstrip("\r\n")}
        elif name.endswith(".json"):
            text = path.read_bytes().decode("utf-8-sig")
            rows = _loads(text) if text.strip() else []
            if not isinstance(rows, list):
                raise InputError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")
            yield from enumerate(rows, 1)
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
            raise InputError(f"{path}: unknown format; use .jsonl, .jsonl.gz, .json, .parquet or .txt")
    except UnicodeError:
        raise InputError(f"{path}:{max(number, 1)}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        row = number if number else error.lineno
        raise InputError(f"{path}:{row}: not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # an integer of too many digits for Python
        raise InputError(f"{path}:{max(number, 1)}: not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path}:{max(number, 1)}: JSON nested too deeply") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: damaged or cut-short gzip file, after row {number}") from None


@contextlib.contextmanager
def write_whole(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path`; it takes the place of `path` once written, flushed and closed."""
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


def write_tensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all; returns its SHA-256.

    `metadata` may have one entry: safetensors writes several in an order drawn anew each time, and equal
    contents must make equal bytes.
    """
    from safetensors.torch import save  # here: scripts that only read rows start without torch

    # not save_file: it renames a file of its own over ours, not fsynced and readable by its owner alone
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    with write_whole(path, "wb") as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def digest(tensors: dict[str, Any]) -> str:
    """SHA-256 of tensors' names, shapes, dtypes and values."""
    from safetensors.torch import save

    return hashlib.sha256(save({name: tensor.contiguous() for name, tensor in tensors.items()})).hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    with write_whole(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
