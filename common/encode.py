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
from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from common.files import InputError, error_prefix
from common.parallel import all_gather, get_rank, get_world_size
from common.rows import Text, message

MARKER = "Marker0of0an0answer"  # no template trims or rewrites it
ROWS = 1000  # of a file, whose texts are encoded together
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
    """The special token that follows an answer in the middle of a conversation; None if none does.

    `template` is part of the cache's key: a tokenizer's may be replaced.
    """
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


def encode_rows(
    rows: Sequence[dict], fields: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[array]], int]:
    """Token ids [prompt, *answers] of training rows, with their keys `fields`, and how many were truncated.

    Each prompt + answer has at most `max_length` tokens (see `truncate`). Under torchrun each process encodes
    a part of the rows, and all get all. An id takes 4 bytes, where in a list it takes 36.
    """
    rank, size = get_rank(), get_world_size()
    first, last = (len(rows) * part // size for part in (rank, rank + 1))
    prompts, *columns = ([row[key] for row in rows[first:last]] for key in fields)
    options, is_cut = ([row.get(key) for row in rows[first:last]] for key in ("template_options", "is_cut"))
    examples, cut = [], 0
    encoded = encode_examples(prompts, columns, tokenizer, options, is_cut, first)
    for whole in tqdm(encoded, "tokenising", last - first, leave=False, unit="row", disable=rank > 0 or None):
        example = truncate(whole, tokenizer.bos_token_id, max_length)
        cut += sum(map(len, example)) < sum(map(len, whole))
        examples.append([array("i", ids) for ids in example])
    parts = all_gather((examples, cut))
    return [example for some, _ in parts for example in some], sum(count for _, count in parts)


def truncate(example: Sequence[list[int]], bos: int | None, max_length: int) -> list[list[int]]:
    """Truncate [prompt, *answers] so that prompt + answer is at most `max_length` tokens.

    The prompt is cut at its start, to max_length minus the longest answer, or to half of max_length if that
    is more. A BOS stays. Then each answer is cut at its end.
    """
    if max_length < 4:
        raise InputError(f"--max_length {max_length} is too small: it must hold a prompt and a completion")
    prompt, *answers = example
    room = max(max_length - max(map(len, answers)), max_length // 2)
    if len(prompt) > room:
        start = prompt[:1] if prompt[0] == bos else []
        prompt = start + prompt[len(prompt) - room + len(start) :]
    return [prompt, *(answer[: max_length - len(prompt)] for answer in answers)]


def encode_examples(
    prompts: Sequence[Text],
    columns: Sequence[Sequence[Text]],
    tokenizer: PreTrainedTokenizerBase,
    options: Sequence[dict | None] | None = None,
    is_cut: Sequence[bool] | None = None,
    first_row: int = 0,
) -> Iterator[list[list[int]]]:
    """Token ids [prompt, *answers] of each row. `columns` are the answers: all chosen, all rejected.

    A prompt starts with one BOS if the tokenizer or its chat template writes one. A message list goes through
    the chat template, with the `options` of its row, up to where the assistant's answer starts. An answer's
    ids have its end token: they are what the model itself would have to write. A string that is an answer
    follows the prompt as it is, also a message list: so a text that was sampled gives the sampled ids. Where
    `is_cut` is true of a row, its answers were cut before they ended, and get no end token. Raises InputError
    naming the row, of which the first has the number first_row + 1.
    """
    ends = {int(i): tokenizer.decode([i]) for i in turn_ends(tokenizer)} if columns else {}
    if columns and not ends:
        raise InputError("the model's tokenizer has no end-of-sequence token, so completions could never end")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    rows = list(zip(prompts, *columns, strict=True))
    for first in range(0, len(rows), ROWS):
        texts = []  # of each row: what the model reads, then the answers
        for row, (prompt, *answers) in enumerate(rows[first : first + ROWS], first):
            with error_prefix(f"row {first_row + row + 1}"):
                arguments = options[row] if options else None
                texts.append(_row_texts(prompt, answers, ends, tokenizer, arguments))
        starts = _ids([opened for opened, *_ in texts], tokenizer)
        wholes = iter(_ids([opened + answer for opened, *answers in texts for answer in answers], tokenizer))
        for row, (start, (_, *answers)) in enumerate(zip(starts, texts, strict=True), first):
            is_string = isinstance(prompts[row], str)
            needs_bos = is_string and (adds_bos or (bos is not None and not start))  # an empty one needs it
            example = [[bos, *start] if needs_bos and start[:1] != [bos] else start]
            with error_prefix(f"row {first_row + row + 1}"):
                if not example[0]:
                    raise InputError("the prompt has no tokens, and the tokenizer no BOS")
                for answer in answers:
                    whole = next(wholes)
                    merges = whole[: len(start)] != start  # the prompt's last letters with the answer's first
                    ids = encode_continuation(answer, tokenizer) if merges else whole[len(start) :]
                    cut = is_cut and is_cut[row]
                    if ids and ids[-1] in ends:
                        ids = ids[:-1] if cut and len(ids) > 1 else ids
                    elif not (cut and ids):
                        turn, *_, eos = *ends, *ends
                        ids = [*ids, eos if is_string else turn]
                    example.append(ids)
            yield example


def encode_prompts(
    prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, options: Sequence[dict] | None = None
) -> list[list[int]]:
    """Token ids of prompts, as in encode_examples."""
    return [ids for [ids] in encode_examples(prompts, [], tokenizer, options)]


def encode_answers(
    prompts: Sequence[Text],
    answers: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    options: Sequence[dict] | None = None,
) -> list[list[int]]:
    """Token ids of each answer to its prompt, as in encode_examples."""
    return [ids for _, ids in encode_examples(prompts, [answers], tokenizer, options)]


def _row_texts(
    prompt: Text,
    answers: Sequence[Text],
    ends: dict[int, str],
    tokenizer: PreTrainedTokenizerBase,
    options: dict | None,
) -> list[str]:
    """What the model reads before it answers, and the text of each answer."""
    opened = prompt if isinstance(prompt, str) else opening(prompt, tokenizer, options)
    if all(isinstance(answer, str) for answer in answers):
        return [opened, *answers]
    around, texts = around_answer(prompt, tokenizer, options), [opened]
    for answer in answers:
        if not isinstance(answer, str):
            answer = _answer_text(prompt, answer, opened, around, ends, tokenizer, options)
        texts.append(answer)
    return texts


def _answer_text(
    prompt: list[dict],
    answer: list[dict],
    opened: str,
    around: tuple[str, str],
    ends: dict[int, str],
    tokenizer: PreTrainedTokenizerBase,
    options: dict | None,
) -> str:
    """What the template writes after `opened` for an answer, up to its first end token.

    `around` is around_answer() of the prompt. Beside a tool call, some templates write no text.
    """
    before, after = around
    whole, last = render([*prompt, *answer], tokenizer, False, options), prompt[-1]["content"].strip()
    start, turns = len(opened), opened.rfind(last) + len(last) if last else 0  # where the prompt's texts end
    if last and opened.count(last) > 1:  # the generation prompt may have it too, as `<think>` has "hi"
        marked = render([*prompt[:-1], prompt[-1] | {"content": MARKER}], tokenizer, True, options)
        turns = len(opened.removesuffix(marked.rpartition(MARKER)[2]))
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
