"""Preference pairs: read them, turn them into token ids, pack them into rows without padding.

    {"prompt": "Best fruit?", "chosen": " The fig.", "rejected": " Mud."}     strings, joined as they are
    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": ...}          HH-RLHF transcripts
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}               the shared start is the prompt

The boundary is exact: a prompt's ids are those that sample.py feeds the model, a completion's are those of
text that *follows* other text, so that decoding both together gives back the text. The end token is part of
the completion: a policy's probability of a text includes the decision to stop.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from files import InputError, naming, read_rows

Text = str | list[dict[str, str]]  # plain, or a message list for the chat template
TURN = "\n\nAssistant:"  # HH-RLHF's mark before each answer


class Pair(NamedTuple):
    """Token ids of one preference."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Packed(NamedTuple):
    """Examples laid end to end as `[prompt | chosen | rejected]`; the prompt is there once.

    A completion's last token is predicted but never fed, since nothing follows it. T is the number of tokens
    fed, M the number predicted.
    """

    ids: Tensor  # (T,)
    position: Tensor  # (T,) place in its own text: every completion starts again at len(prompt)
    example: Tensor  # (T,) which example a token belongs to
    branch: Tensor  # (T,) 0 prompt, 1 first completion (chosen), 2 second (rejected)
    source: Tensor  # (M,) index into the row of the token whose hidden state predicts ...
    target: Tensor  # (M,) ... this token id
    column: Tensor  # (M,) example * completions + completion: whose log-probability it adds to
    lengths: list[int]  # tokens fed, per example
    completions: int  # per example: 2 for pairs, 1 for supervised examples, 0 for prompts alone


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """Rows with keys prompt, chosen and rejected: all strings, or all message lists.

    Raises InputError naming the file and row for a row in none of the formats above.
    """
    return [_as_pair(row, where) for where, row in read_rows(path)]


def _as_pair(row: dict[str, Any], where: str) -> dict[str, Any]:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise InputError(f"{where}: no key '{key}' (found {', '.join(map(repr, row)) or 'none'})")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            shared = os.path.commonprefix([chosen, rejected])
            cut = shared.rfind(TURN) + len(TURN)
            if cut < len(TURN):
                raise InputError(f"{where}: no 'prompt', and no shared prompt up to a {TURN!r}")
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        elif not isinstance(prompt, str):
            raise InputError(f"{where}: 'prompt' must be a string like 'chosen', not {type(prompt).__name__}")
        empty = [key for key, text in (("chosen", chosen), ("rejected", rejected)) if not text]
        if empty:
            raise InputError(f"{where}: empty completion in '{empty[0]}'")
    elif isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):  # whole conversations; a string beside them repeats the question
            same = [a == b for a, b in zip(chosen, rejected, strict=False)]
            cut = min(same.index(False) if False in same else len(same), len(chosen) - 1, len(rejected) - 1)
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
            if not prompt:
                raise InputError(f"{where}: 'chosen' and 'rejected' have no shared prompt to start with")
        for key, answer in (("chosen", chosen), ("rejected", rejected)):
            check_messages([*prompt, *answer], f"{where}: '{key}'")
            if len(answer) != 1 or answer[0]["role"] != "assistant":
                raise InputError(f"{where}: '{key}' must be one assistant message after the shared prompt")
            if not answer[0]["content"]:
                raise InputError(f"{where}: empty completion in '{key}'")
    else:
        raise InputError(f"{where}: 'chosen' and 'rejected' must both be strings, or both message lists")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows with a 'prompt', a string or a message list; from a .txt file, one prompt per line.

    Raises InputError naming the file and row.
    """
    rows = []
    for where, row in read_rows(path):
        prompt = row.get("prompt")
        if isinstance(prompt, list) and prompt:
            check_messages(prompt, where)
        elif not isinstance(prompt, str):
            raise InputError(f"{where}: needs a 'prompt', a string or a message list")
        rows.append(row)
    return rows


def check_messages(messages: list[Any], where: str) -> None:
    """Raise InputError unless roles run [system], user, assistant, user, ... with string contents."""
    for message in messages:
        fields = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(value, str) for value in fields):
            raise InputError(f"{where}: a message needs a string 'role' and a string 'content'")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise InputError(f"{where}: roles out of order: {', '.join(roles) or 'no message'}")


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def encode_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts, to continue from: one BOS if the tokenizer or its chat template writes one.

    A message list goes through the chat template, opened for the assistant's answer.
    Raises InputError for messages without a chat template, and for a prompt with no token at all.
    """
    texts = []
    for number, prompt in enumerate(prompts, 1):
        with naming(f"row {number}"):
            texts.append(prompt if isinstance(prompt, str) else _template(prompt, tokenizer, generate=True))
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    encoded = _encode(texts, tokenizer)
    for number, (prompt, text, ids) in enumerate(zip(prompts, texts, encoded, strict=True), 1):
        if isinstance(prompt, str) and ids[:1] != [bos] and (adds_bos or (not ids and bos is not None)):
            ids.insert(0, bos)
        if not ids:
            raise InputError(f"row {number}: the prompt {text!r} has no tokens, and the tokenizer no BOS")
    return encoded


def _template(messages: list[dict], tokenizer: PreTrainedTokenizerBase, generate: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError("message lists need a chat template, and the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template refuses the messages: {error}") from None


def encode_continuations(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts as they follow other text.

    SentencePiece-like tokenizers (Llama 2, Mistral) put a space before every text they encode, which in a
    continuation would be one too many. There, encode `anchor + text` and drop the anchor's ids. Raises
    InputError if no anchor keeps its own ids.
    """
    a, b = _encode(["a", "b"], tokenizer)
    if tokenizer.decode(a + b) == "ab":
        return _encode(texts, tokenizer)
    anchors = ["\n", "a", "0", "."]
    starts = _encode(anchors, tokenizer)

    def after_anchor(text: str) -> list[int]:
        for anchor, start in zip(anchors, starts, strict=True):
            ids = _encode([anchor + text], tokenizer)[0]
            if ids[: len(start)] == start:
                return ids[len(start) :]
        raise InputError(f"the tokenizer merges every anchor with the completion {text[:40]!r}")

    return [after_anchor(text) for text in texts]


def decode_continuation(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of token ids that follow other text; SentencePiece-like decoders drop a text's first space."""
    anchor, length = _anchor(tokenizer)
    return tokenizer.decode(anchor + ids)[length:]


@functools.cache
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    [anchor] = _encode(["a"], tokenizer)
    return anchor, len(tokenizer.decode(anchor))


def encode_answers(
    prompts: Sequence[Text], answers: Sequence[Text], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each answer to its prompt, with the end token: what the model itself would have to write.

    In a chat template the end token is the special token that closes the assistant's turn, else EOS.
    """
    special = tuple({*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())})
    texts, ended = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        text, closed = answer, False
        if not isinstance(answer, str):
            opened = _template(prompt, tokenizer, generate=True)
            whole = _template([*prompt, *answer], tokenizer, generate=False)
            if not whole.startswith(opened):
                raise InputError("the chat template does not extend its own prompt; use rows of strings")
            text, content = whole[len(opened) :], answer[-1]["content"]
            closed = text.partition(content.strip() or content)[2].rstrip().endswith(special)
            if closed:  # the model never writes the template's newline after <|im_end|>
                text = text.rstrip()
        texts.append(text)
        ended.append(closed)
    if not all(ended) and tokenizer.eos_token_id is None:
        raise InputError("the model's tokenizer has no end-of-sequence token, so completions could never end")
    encoded = encode_continuations(texts, tokenizer)
    return [ids if end else ids + [tokenizer.eos_token_id] for ids, end in zip(encoded, ended, strict=True)]


def tokenize(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Pair]:
    """Token ids of rows from read_pairs, prompt + completion at most `max_length`; prints how many it cut.

    An over-long pair keeps the end of its prompt (half of max_length, or what the completions leave) and the
    start of its completions. Pairs whose completions are equal, before or after the cut, are dropped.
    Raises InputError when max_length is under 4, or when no pair is left.
    """
    prompts, chosen, rejected = ([row[key] for row in rows] for key in Pair._fields)
    answers = (encode_answers(prompts, texts, tokenizer) for texts in (chosen, rejected))
    whole = [Pair(*ids) for ids in zip(encode_prompts(prompts, tokenizer), *answers, strict=True)]
    pairs = [Pair(*fit(pair, tokenizer.bos_token_id, max_length)) for pair in whole]
    cut = sum(a != b for a, b in zip(whole, pairs, strict=True))
    kept = [pair for pair in pairs if pair.chosen != pair.rejected]
    dropped = f"dropped {len(pairs) - len(kept):,} with chosen equal to rejected"
    if not kept:
        raise InputError(f"no pair left of {len(pairs):,}: {dropped}")
    print(f"{len(kept):,} pairs: cut {cut:,} to {max_length} tokens, {dropped}")
    return kept


def fit(example: Sequence[list[int]], bos: int | None, max_length: int) -> list[list[int]]:
    """Cut (prompt, *completions) so that the prompt with each completion is at most max_length tokens."""
    if max_length < 4:
        raise InputError(f"--max_length {max_length} is too small: it must hold a prompt and a completion")
    prompt, *completions = example
    room = max(max_length - max(map(len, completions)), max_length // 2)
    if len(prompt) > room:
        head = prompt[:1] if prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    return [prompt, *(completion[: max_length - len(prompt)] for completion in completions)]


def pack(pairs: Sequence[Sequence[list[int]]]) -> Packed:
    """Lay examples (prompt, *completions), all with as many completions, end to end in one row."""
    ids, position, example, branch, source, target, column, lengths = ([] for _ in range(8))
    for index, (prompt, *completions) in enumerate(pairs):
        start = len(ids)
        ids += prompt
        position += range(len(prompt))
        branch += [0] * len(prompt)
        for number, completion in enumerate(completions):
            # the prompt's last token predicts each completion's first, and every fed token the next one
            source += [start + len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)]
            target += completion
            column += [index * len(completions) + number] * len(completion)
            ids += completion[:-1]
            position += range(len(prompt), len(prompt) + len(completion) - 1)
            branch += [number + 1] * (len(completion) - 1)
        lengths.append(len(ids) - start)
        example += [index] * lengths[-1]
    rows = (torch.tensor(row) for row in (ids, position, example, branch, source, target, column))
    return Packed(*rows, lengths=lengths, completions=len(pairs[0]) - 1)
