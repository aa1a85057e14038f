"""Files: written whole or not at all, locked, digested; and InputError, one line about bad input.

A file is written under a temporary name that is then renamed, so that a reader never sees half a file and an
interrupted run leaves the old file as it was.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent  # the project's folder
MAX_DEPTH = 100  # of nested JSON
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt")
TOKENIZER_FILES += ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
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


def print_error(error: Exception) -> None:
    """Print an exception's message as one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def error_prefix(path: str | Path) -> Iterator[None]:
    """Put `path`, or a flag, row or step, in front of the message of any InputError raised in the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


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
    """SHA-256 of json.dumps(value, sort_keys=True); arrays of numbers count as lists."""
    sha256 = hashlib.sha256()
    for piece in _json_pieces(value):
        sha256.update(piece.encode())
    return sha256.hexdigest()


def _json_pieces(value: Any) -> Iterator[str]:
    """The same JSON in pieces, since that of a million examples is gigabytes; a list of ids is one piece."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        for index, item in enumerate(value):
            yield ", " if index else "["
            yield from _json_pieces(item)
        yield "]"
    else:
        yield json.dumps(value, sort_keys=True, default=array.tolist)


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            sha256.update(block)
    return sha256.hexdigest()
