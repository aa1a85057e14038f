"""Rows of text: which layouts of pairs, prompts, messages and samples are read.

    {"prompt": "Best fruit?", "chosen": " The fig.", "rejected": " Mud."}     strings, joined as they are
    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": ...}          HH-RLHF transcripts
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}               the shared start is the prompt

Both completions may repeat the prompt at their start. A string prompt may go with message-list completions,
and a message-list prompt with strings, as sample.py wrote them.
"""

import contextlib
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.files import InputError, fill, parse_json, require_file

Text = str | list[dict[str, str]]  # a plain string, or a message list for the chat template
ASSISTANT = "\n\nAssistant:"  # HH-RLHF writes this before each answer
KEYS = ("prompt", "chosen", "rejected")


def read_pairs(path: str | Path, chat: bool = False) -> list[dict[str, Any]]:
    """Rows with keys prompt, chosen and rejected, strings or message lists, and template_options().

    Completions that repeat their prompt lose it, strings only if all of the file do; the number is printed.
    With `chat`, strings become messages. Raises InputError naming the file and row for a row in none of the
    formats above.
    """
    rows, pairs = list(read_rows(path)), []
    # of all rows of strings: of one it may be chance, "Hi" and "High time"
    texts_repeat = all(_repeats_prompt(row) for _, row in rows if isinstance(row.get("prompt"), str))
    repeats = 0
    for index, (where, row) in enumerate(rows):
        rows[index] = None  # a million rows need not be held twice
        for key in ("chosen", "rejected"):
            if key not in row:
                raise InputError(f"{where}: no key '{key}' (found {', '.join(map(repr, row)) or 'none'})")
        prompt, answers = row.get("prompt"), (row["chosen"], row["rejected"])
        if not (all(isinstance(a, str) for a in answers) or all(isinstance(a, list) for a in answers)):
            raise InputError(f"{where}: 'chosen' and 'rejected' must both be strings, or both message lists")
        if _repeats_prompt(row) and (texts_repeat or not isinstance(prompt, str)):
            answers, repeats = [a[len(prompt) :] for a in answers], repeats + 1
        if isinstance(answers[0], str):
            pair = _string_pair(prompt, *answers, where)
        else:
            pair = _message_pair(prompt, *answers, where)
        if chat and isinstance(pair[0], str):
            pair = to_messages(pair[0]), *(message("assistant", text.strip() or text) for text in pair[1:])
            check_prompt(pair[0], where)
        pairs.append(dict(zip(KEYS, pair, strict=True)) | template_options(row, pair[0], where))
    if repeats:
        print(f"{path}: in {repeats:,} rows chosen and rejected repeat the prompt: removed from both")
    return pairs


def _repeats_prompt(row: dict[str, Any]) -> bool:
    """Whether both completions begin with the row's prompt, and with whole words of it."""
    prompt, answers = row.get("prompt"), (row.get("chosen"), row.get("rejected"))
    if not prompt or any(type(a) is not type(prompt) or a[: len(prompt)] != prompt for a in answers):
        return False
    ends = isinstance(prompt, list) or not prompt[-1:].isalnum()
    return ends or not any(a[len(prompt) :][:1].isalnum() for a in answers)


def template_options(row: dict[str, Any], prompt: Text, where: str) -> dict[str, dict[str, Any]]:
    """{"template_options": a row's 'tools' and 'chat_template_kwargs', for the template}, or {} without them.

    Adds a row's 'system' to the messages of `prompt`, in place. Raises InputError with `where` if one of
    these keys cannot have its effect, since the prompt is a string.
    """
    options, more = {"tools": row["tools"]} if row.get("tools") else {}, row.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise InputError(f"{where}: 'chat_template_kwargs' must be an object")
    options |= more
    for key in ("system", "tools", "chat_template_kwargs"):
        if row.get(key) and isinstance(prompt, str):
            raise InputError(f"{where}: '{key}' is for message lists: give --chat, or put it into the prompt")
    if system := row.get("system"):
        if not isinstance(system, str) or prompt[0]["role"] == "system":
            raise InputError(f"{where}: 'system' must be a string, and the prompt have no system message")
        prompt.insert(0, {"role": "system", "content": system})
    return {"template_options": options} if options else {}


def _string_pair(prompt: Any, chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    if prompt is None:
        shared = os.path.commonprefix([chosen, rejected])
        end = shared.rfind(ASSISTANT) + len(ASSISTANT)
        if end < len(ASSISTANT):
            raise InputError(f"{where}: no 'prompt', and no shared prompt up to a {ASSISTANT!r}")
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    elif isinstance(prompt, list):  # the texts are what sample.py wrote after it
        check_prompt(prompt, where)
    elif not isinstance(prompt, str):
        raise InputError(f"{where}: 'prompt' must be a string like 'chosen', not {type(prompt).__name__}")
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise InputError(f"{where}: empty completion in '{key}'")
    return prompt, chosen, rejected


def _message_pair(prompt: Any, chosen: list, rejected: list, where: str) -> tuple[list, list, list]:
    text = prompt if isinstance(prompt, str) else ""
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        prompt = message("user", prompt)
    elif not isinstance(prompt, list):  # whole conversations, of which a string prompt repeats a message
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        end = min(same.index(False) if False in same else len(same), len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
        if not prompt:
            raise InputError(f"{where}: 'chosen' and 'rejected' have no shared prompt to start with")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        check_messages([*prompt, *answer], f"{where}: '{key}'")
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise InputError(f"{where}: '{key}' must be one assistant message after the shared prompt")
        if not answer[0]["content"]:
            raise InputError(f"{where}: empty completion in '{key}'")
    if not any(text.strip() in turn["content"] for turn in prompt):
        raise InputError(f"{where}: 'prompt' is in no message that 'chosen' and 'rejected' share")
    return prompt, chosen, rejected


def message(role: str, content: str) -> list[dict[str, str]]:
    """A list of one message."""
    return [{"role": role, "content": content}]


def to_messages(prompt: str) -> list[dict[str, str]]:
    """A string prompt as a message list: one user message, or the turns of an HH-RLHF transcript.

    Neighbouring turns of one speaker, which HH-RLHF has, become one message.
    """
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt.removesuffix(ASSISTANT))
    if before or not turns:
        return message("user", prompt)
    messages: list[dict[str, str]] = []
    for speaker, text in zip(turns[::2], turns[1::2], strict=True):
        role, text = "user" if speaker == "Human" else "assistant", text.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages += message(role, text)
    return messages


def check_messages(messages: list[Any], where: str) -> None:
    """Raise InputError unless roles run [system], user, assistant, user, ... with string contents."""
    for message in messages:
        values = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise InputError(f"{where}: a message needs a string 'role' and a string 'content'")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise InputError(f"{where}: roles out of order: {', '.join(roles) or 'no message'}")


def check_prompt(messages: list[Any], where: str) -> None:
    """check_messages(), and that an answer comes next."""
    check_messages(messages, where)
    if messages[-1]["role"] != "user":
        raise InputError(f"{where}: a prompt must end with a message of the user")


def read_prompts(path: str | Path, template: str | None = None, chat: bool = False) -> list[dict[str, Any]]:
    """Rows with a 'prompt', a string or a message list; a .txt file holds one prompt per line.

    With `template`, the prompt is the template with {question} replaced by the row's 'question' (as in GSM8K)
    or 'problem' (as in MATH). With `chat`, strings become messages. The template_options() are added. Raises
    InputError naming the file and row.
    """
    rows = []
    for where, row in read_rows(path):
        if template:
            row["prompt"] = fill(template, question=read_question(row, where))
        prompt = row.get("prompt")
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt)):
            raise InputError(f"{where}: needs a 'prompt', a string or a message list")
        if chat and isinstance(prompt, str):
            row["prompt"] = to_messages(prompt)
        if not isinstance(row["prompt"], str):
            check_prompt(row["prompt"], where)
        rows.append(row | template_options(row, row["prompt"], where))
    return rows


def read_question(row: dict[str, Any], where: str) -> str:
    """The string 'question' or 'problem' of a row. Raises InputError with `where` if it has none."""
    question = row.get("question", row.get("problem"))
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: needs a 'question' or a 'problem', a string")
    return question


def read_examples(path: str | Path, chat: bool = False) -> list[dict[str, Any]]:
    """Rows with keys prompt, completion and is_cut, for supervised fine-tuning, and their template_options().

    A row holds "prompt" and "completion", strings or message lists, or a message list and the string that
    sample.py wrote after it; or "messages", of which the last is the completion. With `chat`, strings become
    messages. Of a text that sample.py cut at its limit, "finish" is "length". Raises InputError naming the
    file and row.
    """
    examples = []
    for where, row in read_rows(path):
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(row.get("messages"), list) and row["messages"]:
            prompt, completion = row["messages"][:-1], row["messages"][-1:]
        if isinstance(prompt, list) and isinstance(completion, list):
            check_messages([*prompt, *completion], where)
            if len(completion) != 1 or completion[0]["role"] != "assistant" or not completion[0]["content"]:
                raise InputError(f"{where}: the completion must be one assistant message with content")
        elif isinstance(prompt, list) and prompt and isinstance(completion, str) and completion:
            check_prompt(prompt, where)
        elif not (isinstance(prompt, str) and isinstance(completion, str) and completion):
            raise InputError(
                f"{where}: needs 'prompt' and a non-empty 'completion', strings or message lists"
            )
        elif chat:
            prompt, completion = to_messages(prompt), message("assistant", completion.strip() or completion)
            check_prompt(prompt, where)
        example = {"prompt": prompt, "completion": completion, "is_cut": row.get("finish") == "length"}
        examples.append(example | template_options(row, prompt, where))
    return examples


class Sample(NamedTuple):
    """One completion that sample.py wrote."""

    prompt: Text
    text: str
    finish: str | None = None  # "eos", "stop" or "length"; None if the file does not say
    is_message: bool = False  # the text is a message's content, not what follows the prompt's tokens
    options: dict[str, Any] | None = None  # template_options() of the row


def sample_row(row: dict[str, Any], completion: str, values: dict[str, Any]) -> dict[str, Any]:
    """What is written of a completion of a row of read_prompts(), for read_sample() and read_examples()."""
    own = options_of(row.get("template_options"))
    return {"prompt": row["prompt"], "completion": completion} | own | values


def options_of(options: dict[str, Any] | None) -> dict[str, Any]:
    """Template arguments, as a row that is written has them: nothing if there are none."""
    return {"chat_template_kwargs": options} if options else {}


def read_sample(row: dict[str, Any], where: str) -> Sample:
    """The sample in a row of sample.py or of data/export.py. Raises InputError with `where` for others."""
    try:
        if "messages" in row:  # messages, arena_hard
            *prompt, answer = row["messages"]
            text = answer["content"]
        elif "instruction" in row:  # alpaca_eval
            prompt, text = row["instruction"], row["output"]
        else:
            prompt, text = row["prompt"], row["completion"]
        text = text["answer"] if isinstance(text, dict) else text
        turns = prompt if isinstance(prompt, list) else message("user", prompt)
        parts = [turn[key] for turn in turns for key in ("role", "content")] + [text]
        options = template_options(row, prompt, where).get("template_options")
        sample = Sample(prompt, text, row.get("finish"), "completion" not in row, options)
    except (LookupError, TypeError, ValueError):
        parts = []
    if len(parts) < 3 or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{where}: needs string 'prompt' and 'completion', or a --format of data/export.py")
    return sample


def last_turn(prompt: Text) -> str:
    """A string prompt, or the content of a message list's last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def transcript(prompt: Text) -> str:
    """A prompt for people to read: a string or a single message as it is, several messages by role."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return last_turn(prompt)
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def to_texts(samples: list[Sample], chat: bool) -> tuple[list[Text], list[Text], list[dict | None]]:
    """(prompts, answers, options) of samples, as encode.py reads them; with `chat`, strings become messages.

    What sample.py wrote after a message list follows the prompt's tokens as it is: the template's space
    before an answer is in the text already.
    """
    prompts, answers = [], []
    for sample in samples:
        makes_messages = chat and isinstance(sample.prompt, str)
        prompts.append(to_messages(sample.prompt) if makes_messages else sample.prompt)
        is_message = makes_messages or (sample.is_message and isinstance(sample.prompt, list))
        text = sample.text.strip() or sample.text if makes_messages else sample.text  # as read_pairs() does
        answers.append(message("assistant", text) if is_message else text)
    return prompts, answers, [sample.options for sample in samples]


def read_samples(path: str | Path, allow_empty: bool = False) -> dict[str, list[Sample]]:
    """The samples of a file in the order of its rows, grouped by prompt; keys are the prompts as JSON.

    Raises InputError naming the file and row for any other row, and for an empty text unless `allow_empty`.
    """
    groups: dict[str, list[Sample]] = {}
    for where, row in read_rows(path):
        sample = read_sample(row, where)
        if not (allow_empty or sample.text.strip()):
            raise InputError(f"{where}: the text is empty, and no metric is defined for it; remove the row")
        groups.setdefault(json.dumps(sample.prompt), []).append(sample)
    return groups


# ---- files of rows


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:row", row) for each JSON object of a .jsonl, .jsonl.gz, .json, .parquet or .csv file.

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


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file begins with a line that is a whole JSON object, and goes on."""
    with open(path, "rb") as file, contextlib.suppress(ValueError, RecursionError):
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
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
                try:
                    for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
                        if None in row:  # a comma without quotes moves all that follows into other columns
                            raise InputError(f"{path}:{number}: more fields than the first line has names")
                        json.dumps(row, ensure_ascii=False).encode()  # fails in the row that is not UTF-8
                        yield number, row
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
