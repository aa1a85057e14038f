"""Flags from a dataclass, @files of flags, and bad input as one line on stderr with exit code 2."""

import argparse
import difflib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from common.files import ROOT, InputError, print_error

Config = TypeVar("Config")


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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; this file imports no torch, to start fast
            raise
        flags = "training: --micro_batch_tokens; sampling: --batch_size, --sample_batch_size or --particles"
        print_error(f"{str(error).partition('.')[0]}: a smaller batch needs less ({flags})")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def raise_input_error(message: str) -> NoReturn:
    """Replacement for ArgumentParser.error, which would print the usage and exit."""
    raise InputError(message)


# ---- flags


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows a docstring with its own line breaks, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def flag(default: Any, help: str, allowed: str | tuple[str, ...] | None = None) -> Any:
    """A field of a Flags dataclass, which parse() turns into a command-line flag with this help text.

    `allowed` is an interval, such as "(0, 1]" or "[1, inf)", or the words that the flag may be; of a list,
    what each of its values may be.
    """
    text = _FlagHelp(f"{help} ({', '.join(allowed)})" if isinstance(allowed, tuple) else help)
    text.allowed = allowed
    return field(default=default, metadata={"help": text})


class _FlagHelp(str):
    """A flag's help text, which also holds what is allowed: HfArgumentParser takes no other metadata."""

    allowed: str | tuple[str, ...] | None


class Flags:
    """Base class of the dataclasses of flags: every value, unless it is None, must be one that is allowed."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), getattr(one.metadata.get("help"), "allowed", None)
            for single in value if isinstance(value, list) else [value]:
                is_allowed, wanted = _check(single, allowed)
                if not is_allowed:
                    raise InputError(f"--{one.name} {single}: must be {wanted}")


def _check(value: Any, allowed: str | tuple[str, ...] | None) -> tuple[bool, str]:
    """Whether a flag's value is allowed, and what is allowed in words."""
    if value is None or allowed is None:
        return True, ""
    if isinstance(allowed, tuple):
        return value in allowed, f"one of {', '.join(allowed)}"
    low, high = map(float, allowed[1:-1].split(","))
    is_above = value >= low if allowed[0] == "[" else value > low
    is_below = value <= high if allowed[-1] == "]" else value < high
    wanted = {"(0, inf)": "a positive number"}.get(allowed, f"in {allowed}")
    return is_above and is_below, f"at least {low:g}" if re.fullmatch(r"\[.*, inf\)", allowed) else wanted


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


def parse(
    config: type[Config],
    description: str | None,
    args: list[str] | None = None,
    default_args: Callable[[argparse.Namespace], list[str]] | None = None,
    may_be_empty: tuple[str, ...] = (),
) -> Config:
    """Read a dataclass of flags from the command line and from @files (flags with values, # comments).

    `args` are the command line's arguments unless given. default_args(what they say) returns arguments that
    are read before them. A path below data/ that the working directory lacks is the project's own. Raises
    InputError for anything that cannot be read, and for an empty string, such as an unset $VARIABLE gives,
    unless `may_be_empty` names the flag.
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
        if default_args:
            argv = default_args(parser.parse_known_args(argv)[0]) + argv
        for name, value in vars(parser.parse_known_args(argv)[0]).items():
            texts = value if isinstance(value, list) else [value]
            if "" in texts and name not in may_be_empty:
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
            own = ROOT / value
            setattr(values, name, str(own) if own.exists() else value)
    return values
