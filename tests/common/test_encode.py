"""Messages to token ids, for the shapes of chat templates and the kinds of tokenizers that are in use.

A Shape is a chat template in parts. Its jinja is what encode.py gets; what must come out is put together from
the parts in Python: the whole text, tokenised once, up to the end token that the shape names.
"""

import json
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from common.encode import (
    answer_lead,
    decode_continuation,
    encode_answers,
    encode_examples,
    encode_prompts,
    turn_ends,
)
from common.files import InputError
from common.rows import Sample, to_texts
from core.hub import save_tokenizer
from train_reward import encode_texts

SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|call|>"]
ADDED = ["<think>", "</think>"]  # added, but no special tokens
WORDS = (
    "The fig",
    "Best fruit?",
    "Be brief.",
    "A grey cat likes warm bread.",
    "\n",
    "a b c d e f g h i j k l m",
)
WORDS += (
    "n o p q r s t u v w x y z",
    "It is 4 : 5 ! [ ] ( ) / 0 1 2",
    "café",
    "Mud",
    "Let me see.",
    "Yes . , ",
)


class Shape(NamedTuple):
    """A chat template: what it writes around the texts of a conversation."""

    bos: str = ""
    user: str = "<|user|>\n"  # before a user's text
    assistant: str = "<|assistant|>\n"  # before an answer, and the generation prompt
    lead: str = ""  # between that and the answer
    end: str = "<|end|>"  # after every text; "": the next user's header ends an answer
    tail: str = "\n"  # behind that
    last: str = ""  # at the end of a conversation
    generation: str = ""  # the generation prompt goes on with this
    always: bool = False  # the generation prompt is written whether asked for or not
    trim: bool = False  # texts are stripped
    thinking: str = "keep"  # "tidy": laid out anew; "drop": left out of every answer
    system: bool = True  # a system message is written, or left out

    def jinja(self) -> str:
        """The template."""
        strip = " | trim" if self.trim else ""
        write = f"{{{{ m.content{strip} }}}}"
        q = lambda text: "{{ " + json.dumps(text) + " }}"  # noqa: E731
        answer = q(self.lead) + write
        after = "m.content.split('</think>')[-1]"
        if self.thinking == "tidy":
            inside = "m.content.split('</think>')[0].split('<think>')[-1]"
            tidy = (
                q("<think>\n")
                + f"{{{{ {inside} | trim }}}}"
                + q("\n</think>\n\n")
                + f"{{{{ {after} | trim }}}}"
            )
            answer = "{% if '</think>' in m.content %}" + tidy + "{% else %}" + answer + "{% endif %}"
        elif self.thinking == "drop":
            answer = q(self.lead) + f"{{{{ {after}{strip} }}}}"
        close = q(self.end + self.tail)
        system = q("<|system|>") + write + close if self.system else ""
        return (
            q(self.bos)
            + "{% for m in messages %}{% if m.role == 'system' %}" + system
            + "{% elif m.role == 'user' %}" + q(self.user) + write + close
            + "{% else %}" + q(self.assistant) + answer + close + "{% endif %}{% endfor %}"
            + ("" if self.always else "{% if add_generation_prompt %}") + q(self.assistant + self.generation)
            + ("" if self.always else "{% else %}" + q(self.last) + "{% endif %}")
        )  # fmt: skip

    def answer(self, text: str) -> str:
        """What the template writes of an answer."""
        if "</think>" in text and self.thinking != "keep":
            thought, _, rest = text.partition("</think>")
            if self.thinking == "drop":
                return self.lead + (rest.strip() if self.trim else rest)
            return f"<think>\n{thought.split('<think>')[-1].strip()}\n</think>\n\n{rest.strip()}"
        return self.lead + (text.strip() if self.trim else text)

    def prompt(self, turns: list[dict]) -> str:
        """The text that the model reads before it answers."""
        text = self.bos
        for turn in turns:
            content = turn["content"].strip() if self.trim else turn["content"]
            if turn["role"] == "assistant":
                text += self.assistant + self.answer(turn["content"]) + self.end + self.tail
            elif turn["role"] == "user" or self.system:
                head = self.user if turn["role"] == "user" else "<|system|>"
                text += head + content + self.end + self.tail
        return text + self.assistant + self.generation

    def completion(self, text: str) -> str:
        """What the model writes: the answer and the first end token after it."""
        text, end = self.answer(text), self.end or self.user.strip()
        if self.end.strip() not in SPECIAL and not self.user.startswith(
            "<|"
        ):  # nothing ends an answer: EOS does
            end = self.end + self.tail + "</s>" if (self.end + self.tail).isspace() else "</s>"
        elif not self.end:
            end = self.tail + end if self.tail.isspace() else end
        return (text if text.startswith(self.generation) else self.generation + text)[
            len(self.generation) :
        ] + end


SHAPES = {
    "chatml": Shape(),
    "no newline": Shape(tail=""),
    "bos": Shape(bos="<s>"),
    "llama 3 as first published: the next header always": Shape(bos="<s>", always=True, tail=""),
    "command a: header always, nothing else": Shape(
        always=True, tail="", user="<|user|>", assistant="<|assistant|>"
    ),
    "phi 3: two ends": Shape(last="</s>"),
    "two ends, bos": Shape(bos="<s>", last="</s>", tail=""),
    "glm: the next role ends": Shape(end="", tail=""),
    "glm with newline headers": Shape(end="", tail="", user="<|user|>", assistant="<|assistant|>"),
    "mistral: a space, eos": Shape(
        bos="<s>", user="[INST] ", assistant=" [/INST]", lead=" ", end="</s>", tail=""
    ),
    "llama 2: a space before eos": Shape(
        bos="<s>", user="[INST] ", assistant=" [/INST]", lead=" ", end=" </s>", tail=""
    ),
    "zephyr: eos, newline": Shape(end="</s>"),
    "openchat": Shape(bos="<s>", user="User: ", assistant="Bot:", lead=" ", tail=""),
    "vicuna": Shape(bos="<s>", user="User: ", assistant="Bot:", lead=" ", end="</s>", tail=""),
    "gemma: trimmed": Shape(bos="<s>", trim=True),
    "trimmed, eos": Shape(end="</s>", tail="", trim=True),
    "alpaca: no end at all": Shape(user="User:\n", assistant="Bot:\n", end="\n\n", tail=""),
    "deepseek llm": Shape(bos="<s>", user="User: ", assistant="Bot:", lead=" ", end="</s>", tail="\n\n"),
    "qwen 3: thinking tidied": Shape(thinking="tidy"),
    "qwen 3.5: generation opens the thinking": Shape(
        thinking="tidy", generation="<think>\n", lead="<think>\n\n</think>\n\n"
    ),
    "no thinking: an empty block before each answer": Shape(lead="<think>\n\n</think>\n\n"),
    "empty block, eos": Shape(lead="<think>\n\n</think>\n\n", end="</s>", tail=""),
    "thinking model": Shape(generation="<think>\n"),
    "r1: generation opens it, answers lack it": Shape(
        bos="<s>", user="<|user|>", assistant="<|assistant|>", generation="<think>\n", thinking="drop",
        end="</s>", tail="",
    ),
    "v3: drops thinking": Shape(thinking="drop"),
    "no system": Shape(system=False),
    "no system, eos": Shape(
        bos="<s>", user="[INST] ", assistant=" [/INST]", end="</s>", tail="", system=False
    ),
    "newline before the end": Shape(end="\n<|end|>"),
    "newline lead": Shape(lead="\n"),
    "space lead, special header": Shape(assistant="<|assistant|>", lead=" ", tail=""),
    "header without newline": Shape(user="<|user|>", assistant="<|assistant|>", tail=""),
    "eos, header always": Shape(end="</s>", always=True),
}  # fmt: skip


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of each kind in use, with the special tokens of the shapes."""
    if kind in ("legacy", "not legacy"):  # Llama 2, Mistral 7B: the word mark after special tokens, or not
        letters = sorted(set("".join(WORDS)) - {" ", "\n"})
        vocab, merges = ["<unk>", *SPECIAL[:2], *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters], []
        for word in ("▁The", "The", "▁fig", "▁is", "is"):
            for size in range(2, len(word) + 1):
                merges.append((word[: size - 1], word[size - 1]))
                vocab.append(word[:size])
        vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
        tokenizer = LlamaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), legacy=kind == "legacy")
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        model, trainer, options = {
            "byte-level": (models.BPE(), trainers.BpeTrainer, {"initial_alphabet": alphabet}),
            "unigram": (models.Unigram(), trainers.UnigramTrainer, {"unk_token": "<unk>"}),
            "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, {}),
        }[kind]  # fmt: skip
        raw = Tokenizer(model)
        if kind == "byte-level":
            raw.pre_tokenizer, raw.decoder = (
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                decoders.ByteLevel(),
            )
        elif kind == "unigram":
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            raw.decoder = decoders.Metaspace()
        else:
            raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece("##")
        raw.train_from_iterator(
            WORDS, trainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, **options)
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer


KINDS = ("byte-level", "legacy", "not legacy", "unigram", "wordpiece")
TOKENIZERS = {kind: make_tokenizer(kind) for kind in KINDS}


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


USER, FIG = turn("user", "Best fruit?"), turn("assistant", "The fig.")
PROMPTS = {
    "one turn": [USER],
    "system": [turn("system", "Be brief."), USER],
    "many turns": [USER, FIG, turn("user", "The fig?"), turn("assistant", "Yes."), turn("user", "A cat.")],
    "spaces": [turn("user", "  Best \n fruit? \n")],
    "a marker inside": [turn("user", "Say <|end|> <|assistant|> </s>")],
    "in the generation prompt too": [turn("user", "hi")],  # in <think>
    "earlier thinking": [USER, turn("assistant", "<think>Let me see.</think>The fig."), USER],
}
ANSWERS = {
    "plain": "The fig.",
    "spaces": " The fig. ",
    "newlines": "The\n\nfig.\n",
    "thinking": "<think>Let me see.</think>The fig.",
    "tidy thinking": "<think>\nLet me see.\n</think>\n\nThe fig.",
    "a marker inside": "A <|user|> cat.",
    "one letter": "A",
}


def check(tokenizer, shape: Shape, prompt: list[dict], answer: str) -> None:
    """The ids are those of the whole text, or the row is refused where a text would vanish."""
    tokenizer.chat_template = shape.jinja()
    has_system = any(turn["role"] == "system" for turn in prompt)
    if has_system and not shape.system:
        with pytest.raises(InputError, match="row 1: the chat template leaves out the system's content"):
            encode_prompts([prompt], tokenizer)
        return
    text = shape.prompt(prompt)
    assert text == tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    [start] = encode_prompts([prompt], tokenizer)
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    assert start == ids(text)
    if "</think>" in answer and shape.thinking == "drop":
        with pytest.raises(InputError, match="row 1: the chat template leaves out the assistant's content"):
            encode_answers([prompt], [[turn("assistant", answer)]], tokenizer)
        return
    [end] = encode_answers([prompt], [[turn("assistant", answer)]], tokenizer)
    completion = shape.completion(answer)
    whole = ids(text + completion)
    if whole[: len(start)] == start:
        assert end == whole[len(start) :]
    else:  # the tokenizer merges the last letters of the prompt with the first of the answer
        assert decode_continuation(end, tokenizer) == completion
    # the text of a sample, read again, gives the sampled ids, if the tokenizer loses nothing of it
    sampled = decode_continuation(end[:-1], tokenizer)
    if completion.startswith(sampled) and whole[: len(start)] == start:
        texts = to_texts([Sample(prompt, sampled, "eos")], False)
        assert encode_answers(*texts[:2], tokenizer, texts[2])[0][:-1] == end[:-1]
        [[_, cut]] = encode_examples([prompt], [[sampled]], tokenizer, None, [True])
        assert cut == end[:-1]
    [[_, cut]] = encode_examples([prompt], [[[turn("assistant", answer)]]], tokenizer, None, [True])
    assert cut == end[:-1]


def test_strings_that_become_messages_lose_the_space_that_templates_write():
    prompts, answers, _ = to_texts([Sample("Hi", " Yes.", "eos"), Sample("Hi", " ", "eos")], True)
    assert prompts == [[turn("user", "Hi")]] * 2
    assert answers == [[turn("assistant", "Yes.")], [turn("assistant", " ")]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_ids_are_those_of_the_whole_text(kind, name):
    for prompt in PROMPTS.values():
        for answer in ANSWERS.values():
            check(TOKENIZERS[kind], SHAPES[name], prompt, answer)


headers = st.sampled_from(["<|user|>\n", "<|user|>", "[INST] ", "User: "])
shapes = st.builds(
    Shape,
    bos=st.sampled_from(["", "<s>"]),
    user=headers,
    assistant=st.sampled_from(["<|assistant|>\n", "<|assistant|>", " [/INST]", "Bot:"]),
    lead=st.sampled_from(["", " ", "\n", "<think>\n\n</think>\n\n"]),
    end=st.sampled_from(["<|end|>", "</s>", " </s>", "\n<|end|>"]),
    tail=st.sampled_from(["", "\n", "\n\n"]),
    last=st.sampled_from(["", "</s>"]),
    generation=st.sampled_from(["", "<think>\n"]),
    always=st.booleans(),
    trim=st.booleans(),
    thinking=st.sampled_from(["keep", "tidy", "drop"]),
    system=st.booleans(),
)


@settings(max_examples=100)
@given(st.sampled_from(KINDS), shapes, st.sampled_from(list(PROMPTS)), st.sampled_from(list(ANSWERS)))
def test_ids_are_those_of_the_whole_text_for_random_templates(kind, shape, prompt, answer):
    check(TOKENIZERS[kind], shape, PROMPTS[prompt], ANSWERS[answer])


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_tokenizer_gives_the_same_ids(kind, tmp_path):
    """transformers drops `legacy` when it saves."""
    TOKENIZERS[kind].save_pretrained(tmp_path / "base")
    if kind == "legacy":
        path = tmp_path / "base" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"legacy": True}))
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    save_tokenizer(base, tmp_path / "run")
    again = AutoTokenizer.from_pretrained(tmp_path / "run")
    for shape in ("mistral: a space, eos", "chatml"):
        base.chat_template = again.chat_template = SHAPES[shape].jinja()
        for prompt in PROMPTS.values():
            assert encode_prompts([prompt], again) == encode_prompts([prompt], base)


def test_ends_are_special_tokens_alone():
    """What follows an answer may be an added token that ends nothing, a text, or BOS."""
    tokenizer = make_tokenizer("byte-level")
    eos = tokenizer.eos_token_id
    for end, found in (
        ("<|end|>", "<|end|>"),
        ("</think>", None),
        ("###", None),
        ("<s>", None),
        ("</s>", "</s>"),
    ):
        tokenizer.chat_template = Shape(end=end, user="User: ", tail="").jinja()
        ids = [] if found in (None, "</s>") else tokenizer.convert_tokens_to_ids([found])
        assert turn_ends(tokenizer) == [*ids, eos]


@pytest.mark.parametrize(("end", "text"), [("<|end|>\n", "['f']<|end|>"), ("<|call|>", None)])
def test_tool_calls_end_as_the_template_ends_them(end, text):
    """With an end that no other answer has, a row is refused."""
    tokenizer = make_tokenizer("byte-level")
    call = "{% if m.tool_calls %}<|assistant|>\n{{ m.tool_calls | string }}" + end + "{% else %}"
    tokenizer.chat_template = (
        "{% for m in messages %}" + call + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    answer = {**turn("assistant", "Let me see."), "tool_calls": ["f"]}
    if text:
        assert tokenizer.decode(encode_answers([[USER]], [[answer]], tokenizer)[0]) == text
    else:
        with pytest.raises(
            InputError, match=r"row 1: .* ends this answer \(a tool call\?\) with no end token"
        ):
            encode_answers([[USER]], [[answer]], tokenizer)


def test_a_template_that_opens_an_answer_in_two_ways_is_refused():
    """Only what the generation prompt has on top, as `<think>`, may be missing before answers."""
    tokenizer = make_tokenizer("byte-level")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    with pytest.raises(InputError, match="row 1: the chat template changes the prompt before an answer"):
        encode_answers([[turn("user", "Hi")]], [[turn("assistant", "Fig.")]], tokenizer)


def test_content_in_parts_and_null_fields():
    tokenizer = make_tokenizer("byte-level")
    parts = "{% for m in messages %}{% for x in m.content %}{% if x.type == 'text' %}{{ x.text }}{% endif %}"
    tokenizer.chat_template = parts + "{% endfor %}{% endfor %}"
    with pytest.raises(
        InputError, match="row 1: the chat template leaves out the user's content: 'Best fruit"
    ):
        encode_prompts([[USER]], tokenizer)
    tokenizer.chat_template = (
        "{% if 'name' in messages[0] %}{{ raise_exception('named') }}{% endif %}" + Shape().jinja()
    )
    assert encode_prompts([[USER | {"name": None}]], tokenizer) == encode_prompts([[USER]], tokenizer)


def test_a_template_writes_the_same_date_on_any_day():
    tokenizer = make_tokenizer("byte-level")
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + Shape().jinja()
    assert tokenizer.decode(encode_prompts([[USER]], tokenizer)[0]).startswith("2025-01-01")


def test_options_of_a_row_reach_the_template():
    tokenizer = make_tokenizer("byte-level")
    tokenizer.chat_template = "{{ tools }}{{ brief }}" + Shape().jinja()
    options = {"tools": [{"name": "f"}], "brief": True}
    [ids] = encode_prompts([[USER]], tokenizer, [options])
    assert tokenizer.decode(ids).startswith("[{'name': 'f'}]True<|user|>")
    [ids] = encode_answers([[USER]], [[FIG]], tokenizer, [options])
    assert tokenizer.decode(ids) == "The fig.<|end|>"


@pytest.mark.parametrize("name", ["mistral: a space, eos", "empty block, eos", "chatml"])
def test_a_reward_model_reads_a_sample_once(name):
    """The template's space or empty block before an answer is not written twice."""
    tokenizer = make_tokenizer("byte-level")
    tokenizer.chat_template, tokenizer.pad_token = SHAPES[name].jinja(), "<s>"
    sampled = answer_lead([USER], tokenizer) + "The fig."
    texts = encode_texts(*to_texts([Sample([USER], sampled, "eos")], False)[:2], tokenizer)
    assert texts == encode_texts([[USER]], [[FIG]], tokenizer)
