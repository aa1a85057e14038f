"""From text to token ids: prompts, answers, chat templates and end tokens.

What is trained must be what is sampled, and what is sampled must be what is scored:

- A prompt's ids are those that sample.py feeds the model: the template's text with its generation prompt.
- An answer's ids are those that the whole text has after them, when prompt and answer are tokenised as one.
  If the tokenizer would merge the prompt's last letters with the answer's first, the answer is tokenised
  apart.
- An answer ends with the first end token after it. What a template writes behind that (a newline, EOS after
  `<|end|>`, the next turn's header) is no part of it, since the model would have stopped.
- Nothing may vanish: a row of which the template leaves a text out is refused.

Where an answer ends is found with a marker in its place: what the template writes before the marker leads up
to an answer, and what it writes after the marker closes it.
"""

import functools
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from common.files import InputError, error_prefix
from common.rows import Text, message

MARKER = "Marker0of0an0answer"  # no template trims or rewrites it
FIELDS = ("content", "reasoning_content", "thinking")  # of a message: what a template must not leave out


class _SameDay(datetime):
    """What chat templates take for today: a run that is resumed tomorrow, or repeated, is the same run."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls(2025, 1, 1, tzinfo=tz)


chat_template_utils.datetime = _SameDay  # templates call strftime_now(), which calls datetime.now()


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def render(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, generate: bool, options: dict | None = None
) -> str:
    """The chat template's text for messages; with `generate` up to where the next answer starts.

    `options` are the template's other arguments, as `tools`. Raises InputError if there is no template, or if
    it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError("message lists need a chat template, and the tokenizer has no chat template")
    # a field that is null, as parquet files write it, is one that is not there
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, **(options or {})
        )
        text.encode()  # a template can write what is no text: half of a surrogate pair
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template refuses the messages: {reason}") from None
    return text


def opening(prompt: list[dict], tokenizer: PreTrainedTokenizerBase, options: dict | None = None) -> str:
    """What the model reads before it answers a message list. Raises InputError if a text of it is missing."""
    text = render(prompt, tokenizer, True, options)
    for turn in prompt:
        # templates drop the thinking of earlier answers: the models were trained so
        _require_all(turn | {"content": turn["content"].rpartition("</think>")[2]}, ("content",), text)
    return text


def _require_all(turn: dict, fields: Sequence[str], text: str) -> None:
    """Raise InputError unless the fields' texts, but for white space, are in what a template wrote."""
    squeezed = "".join(text.split())
    for field in fields:
        value = turn.get(field)
        if isinstance(value, str) and "".join(value.split()) not in squeezed:
            raise InputError(f"the chat template leaves out the {turn['role']}'s {field}: {value[:60]!r}")


def around_answer(
    prompt: list[dict], tokenizer: PreTrainedTokenizerBase, options: dict | None = None
) -> tuple[str, str]:
    """What a template writes before and after the content of an answer to `prompt`."""
    text = render([*prompt, *message("assistant", MARKER)], tokenizer, False, options)
    before, marker, after = text.partition(MARKER)
    if not marker:
        raise InputError("the chat template does not write what the assistant says")
    return before, after


def answer_lead(prompt: Text, tokenizer: PreTrainedTokenizerBase, options: dict | None = None) -> str:
    """What the template writes between prompt and answer, as a space or an empty `<think></think>`."""
    if isinstance(prompt, str):
        return ""
    opened, (before, _) = opening(prompt, tokenizer, options), around_answer(prompt, tokenizer, options)
    return before.removeprefix(opened) if before.startswith(opened) else ""


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The special token that follows an answer in the middle of a conversation; None if none does."""
    turns = [message(role, text)[0] for role, text in (("user", "a"), ("assistant", MARKER), ("user", "b"))]
    try:
        after = render(turns, tokenizer, False).partition(MARKER)[2].strip()
    except InputError:
        return None
    [ids] = _ids([after], tokenizer)
    first = next((i for i in ids if tokenizer.decode([i]).strip()), None)  # not a word mark alone
    added = tokenizer.added_tokens_decoder.get(first)
    is_end = added is not None and added.special and after.startswith(str(added))
    return first if is_end and first != tokenizer.bos_token_id else None


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer in the chat template: of a turn, then EOS."""
    template = str(tokenizer.chat_template) if tokenizer.chat_template else None
    ids = [_turn_end(tokenizer, template) if template else None, tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in ids if i is not None))


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]
) -> list[int]:
    """Every token id that ends a completion: the tokenizer's EOS, those in the model's generation config, and
    if any prompt is a message list, the token that closes a turn in the chat template.

    Raises InputError if the generation config names something else than token ids.
    """
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [] if own is None else [own]
    if not all(type(id) is int and abs(id) < 2**31 for id in ids):
        raise InputError(f"generation_config.json: eos_token_id {own!r} is no token id")
    ids = {*ids, tokenizer.eos_token_id} - {None}
    if not all(isinstance(prompt, str) for prompt in prompts):
        ids |= set(turn_ends(tokenizer))
    return sorted(ids)


def encode_prompts(
    prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, options: Sequence[dict] | None = None
) -> list[list[int]]:
    """Token ids of prompts, starting with one BOS if the tokenizer or its chat template writes one.

    A message list goes through the chat template, with the `options` of its row, up to where the assistant's
    answer starts. Raises InputError naming the row for a prompt with no token at all, and as opening() does.
    """
    texts, encoded = _texts(prompts, tokenizer, options), []
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    for number, (prompt, ids) in enumerate(zip(prompts, _ids(texts, tokenizer), strict=True), 1):
        needs_bos = adds_bos or (bos is not None and not ids)  # an empty prompt needs a token to start from
        if isinstance(prompt, str) and needs_bos and ids[:1] != [bos]:
            ids = [bos, *ids]
        if not ids:
            raise InputError(f"row {number}: the prompt has no tokens, and the tokenizer no BOS")
        encoded.append(ids)
    return encoded


def _texts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, options: Any) -> list[str]:
    texts = []
    for number, prompt in enumerate(prompts, 1):
        with error_prefix(f"row {number}"):
            some = options[number - 1] if options else None
            texts.append(prompt if isinstance(prompt, str) else opening(prompt, tokenizer, some))
    return texts


def encode_answers(
    prompts: Sequence[Text],
    answers: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    options: Sequence[dict] | None = None,
) -> list[list[int]]:
    """Token ids of each answer to its prompt, end token included: what the model itself would have to write.

    A message goes through the chat template. A string follows the prompt as it is, also a message list: so a
    text that was sampled gives the sampled ids. Raises InputError naming the row.
    """
    openings, texts = _texts(prompts, tokenizer, options), []
    ends = {int(i): tokenizer.decode([i]) for i in turn_ends(tokenizer)}
    for number, (prompt, answer, opened) in enumerate(zip(prompts, answers, openings, strict=True), 1):
        with error_prefix(f"row {number}"):
            if not ends:
                reason = "the model's tokenizer has no end-of-sequence token"
                raise InputError(f"{reason}, so completions could never end")
            some = options[number - 1] if options else None
            is_text = isinstance(answer, str)
            texts.append(answer if is_text else _answer_text(prompt, answer, opened, ends, tokenizer, some))
    starts, encoded = _ids(openings, tokenizer), []
    wholes = _ids([a + b for a, b in zip(openings, texts, strict=True)], tokenizer)
    for prompt, text, start, whole in zip(prompts, texts, starts, wholes, strict=True):
        merges = whole[: len(start)] != start  # the prompt's last letters with the answer's first
        ids = encode_continuation(text, tokenizer) if merges else whole[len(start) :]
        if not ids or ids[-1] not in ends:
            turn, *_, eos = *ends, *ends
            ids = [*ids, eos if isinstance(prompt, str) else turn]
        encoded.append(ids)
    return encoded


def _answer_text(
    prompt: list[dict],
    answer: list[dict],
    opened: str,
    ends: dict[int, str],
    tokenizer: PreTrainedTokenizerBase,
    options: dict | None,
) -> str:
    """What the template writes after `opened` for an answer, up to its first end token.

    Beside a tool call, some templates write no text.
    """
    whole, last = render([*prompt, *answer], tokenizer, False, options), prompt[-1]["content"].strip()
    before, after = around_answer(prompt, tokenizer, options)
    start, turns = len(opened), opened.rfind(last) + len(last) if last else 0  # where the prompt's texts end
    if not whole.startswith(opened):
        # the generation prompt may go on where answers do not, with `<think>`: they follow it all the same
        start = len(os.path.commonprefix([opened, before]))
        if before[start:].strip() or not (start >= turns and whole.startswith(opened[:start])):
            raise InputError("the chat template changes the prompt before an answer; use rows of strings")
    text = whole[start:]
    fields = [name for name in FIELDS if not (name == "content" and answer[0].get("tool_calls"))]
    _require_all(answer[0], fields, whole[turns:])
    size = len(text) - len(after) if text.endswith(after) else 0
    found = [(text.find(end, size), end) for end in ends.values() if text.find(end, size) >= 0]
    if found:
        place, end = min(found)
        return text[: place + len(end)]
    if not text.endswith(after):
        raise InputError("the chat template ends this answer (a tool call?) with no end token that is known")
    return text if after.isspace() else text[:size]


def encode_continuation(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that follows other text.

    SentencePiece tokenizers (Llama 2, Mistral) put a space before every text that they encode, which is wrong
    for a continuation. For them, encode `anchor + text` and drop the anchor's ids. Raises InputError if the
    text merges with every anchor.
    """
    a, b = _ids(["a", "b"], tokenizer)
    if tokenizer.decode(a + b) == "ab":
        return _ids([text], tokenizer)[0]
    for anchor in ("\n", "a", "0", "."):
        start, ids = _ids([anchor, anchor + text], tokenizer)
        if ids[: len(start)] == start:
            return ids[len(start) :]
    raise InputError(f"the tokenizer cannot encode the completion {text[:40]!r} apart from its prompt")


def decode_continuation(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of token ids that follow other text. (SentencePiece decoders drop the first space of a text.)"""
    anchor, length = _anchor(tokenizer)
    return tokenizer.decode(anchor + ids, clean_up_tokenization_spaces=False)[length:]


@functools.cache
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    [anchor] = _ids(["a"], tokenizer)
    return anchor, len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
