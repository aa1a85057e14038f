"""Rows to token ids to packed rows: formats, exact boundaries, cuts, and nothing lost on the way."""

import copy
import gzip
import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import common.encode
from common.encode import encode_answers, encode_examples, encode_prompts, encode_rows, truncate
from common.files import InputError
from common.rows import read_pairs, read_prompts, to_messages
from core.pairs import describe, pack, tokenize
from scripts import call, read_lines
from tiny import FIG, MUD, PAIR, USER, lines

MESSAGES = {"prompt": [USER], "chosen": [FIG], "rejected": [MUD]}
SYSTEM = {"role": "system", "content": "Be brief."}
TURN = "\n\nHuman: hello\n\nAssistant:"

WORDS = (*"abeghinotuzëé日.?!:' \n", "  ", "\n\n", "The fig", " likes", " does not want", "Human", "café")
texts = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
ids = st.lists(st.integers(0, 9), min_size=1, max_size=12)


def write_rows(path, rows):
    """Write rows in the format that the path's ending names."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes(gzip.compress(lines(*rows)) if path.suffix == ".gz" else lines(*rows))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (PAIR, PAIR),
        ({**PAIR, "prompt": "", "score": 0.5}, {**PAIR, "prompt": ""}),
        (
            {"chosen": TURN + " Hi", "rejected": TURN + " Ho"},
            {"prompt": TURN, "chosen": " Hi", "rejected": " Ho"},
        ),
        (
            {"chosen": TURN + " Hi" + TURN + " A", "rejected": TURN + " Hi" + TURN + " B"},
            {"prompt": TURN + " Hi" + TURN, "chosen": " A", "rejected": " B"},
        ),
        (
            {"chosen": TURN + " Hi", "rejected": TURN + " "},
            {"prompt": TURN, "chosen": " Hi", "rejected": " "},
        ),
        (MESSAGES, MESSAGES),
        ({"chosen": [USER, FIG], "rejected": [USER, MUD]}, MESSAGES),
        ({"prompt": "Best fruit?", "chosen": [USER, FIG], "rejected": [USER, MUD]}, MESSAGES),
        ({"chosen": [USER, FIG], "rejected": [USER, FIG]}, {**MESSAGES, "rejected": [FIG]}),
        (
            {"chosen": [SYSTEM, USER, MUD, USER, FIG], "rejected": [SYSTEM, USER, MUD, USER, MUD]},
            {**MESSAGES, "prompt": [SYSTEM, USER, MUD, USER]},
        ),
    ],
    ids=[
        "strings", "empty prompt", "hh", "hh two turns", "hh blank answer",
        "messages", "conversations", "ultrafeedback", "equal conversations", "long conversations",
    ],
)  # fmt: skip
def test_every_format_reads_as_one_pair(tmp_path, name, row, pair):
    assert read_pairs(write_rows(tmp_path / name, [row, row])) == [pair, pair]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": TURN, "chosen": TURN + " Hi", "rejected": TURN + " Ho"}, (TURN, " Hi", " Ho")),
        ({"prompt": [USER], "chosen": [USER, FIG], "rejected": [USER, MUD]}, ([USER], [FIG], [MUD])),
        (
            {
                "prompt": [USER, MUD, USER],
                "chosen": [USER, MUD, USER, FIG],
                "rejected": [USER, MUD, USER, MUD],
            },
            ([USER, MUD, USER], [FIG], [MUD]),
        ),
    ],
    ids=["strings", "messages", "long conversations"],
)
def test_a_prompt_repeated_by_both_completions_is_removed_and_counted(tmp_path, capsys, row, pair):
    path = write_rows(tmp_path / "rows.jsonl", [row, MESSAGES, row])
    pair = dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))
    assert read_pairs(path) == [pair, MESSAGES, pair]
    printed = capsys.readouterr().out
    assert printed == f"{path}: in 2 rows chosen and rejected repeat the prompt: removed from both\n"


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "The fig", "chosen": "The fig is it.", "rejected": " Mud."}],
        [{"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi!"}, PAIR],  # not in every row
        [{"prompt": "Hi", "chosen": "High time.", "rejected": "Hi!"}],  # inside a word
    ],
)
def test_a_prompt_that_is_repeated_by_chance_is_left(tmp_path, capsys, rows):
    assert read_pairs(write_rows(tmp_path / "rows.jsonl", rows)) == rows
    assert capsys.readouterr().out == ""


def test_a_string_prompt_before_message_lists_is_a_user_s_message(tmp_path):
    row = {"prompt": "Best fruit?", "chosen": [FIG], "rejected": [MUD]}
    assert read_pairs(write_rows(tmp_path / "rows.jsonl", [row])) == [MESSAGES]


def test_chat_turns_strings_into_messages(tmp_path):
    hh = "\n\nHuman: Best fruit?\n\nAssistant: Mud.\n\nHuman: Best fruit?\n\nAssistant:"
    rows = [PAIR, {"chosen": hh + " The fig.", "rejected": hh + " Mud."}, MESSAGES]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_pairs(path, chat=True) == [MESSAGES, {**MESSAGES, "prompt": [USER, MUD, USER]}, MESSAGES]
    assert read_pairs(path)[0] == PAIR


def test_prompts_become_messages_turn_by_turn():
    assert to_messages("Best fruit?") == [USER]
    assert to_messages("\n\nHuman: Best fruit?") == [USER]
    assert to_messages("\n\nHuman: Best fruit?\n\nAssistant:") == [USER]
    assert to_messages("\n\nHuman: Best\n\nHuman: fruit?")[0]["content"] == "Best\n\nfruit?"
    assert to_messages("Say\n\nHuman: Hi") == [{"role": "user", "content": "Say\n\nHuman: Hi"}]


def test_the_shown_pair_has_its_boundaries(tokenizer):
    [pair] = tokenize([PAIR], tokenizer, 64)
    prompt, chosen, rejected = describe(pair, tokenizer).splitlines()
    assert prompt.startswith("  prompt ") and "Best fruit?" in prompt and "fig" not in prompt
    assert chosen.startswith("  chosen ") and chosen.endswith('The fig.</s>"')
    assert rejected.startswith("  rejected ") and rejected.endswith('Mud.</s>"')


@pytest.mark.parametrize("prompt", ["", "The fig", "\n", "<s>The fig"])
def test_plain_prompt_has_one_bos_where_the_tokenizer_writes_one(tokenizer, prompt):
    writes_one = bool(tokenizer("").input_ids) or prompt == "" or prompt.startswith("<s>")
    (found,) = encode_prompts([prompt], tokenizer)
    assert found.count(tokenizer.bos_token_id) == writes_one
    assert (found[0] == tokenizer.bos_token_id) == writes_one


def test_chat_prompt_is_the_templates_own_ids_with_one_bos(chat_tokenizer):
    prompts = [[USER], [SYSTEM, USER, FIG, USER]]
    for prompt, found in zip(prompts, encode_prompts(prompts, chat_tokenizer), strict=True):
        expected = chat_tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert found == expected
        assert found.count(chat_tokenizer.bos_token_id) == 1


@settings(max_examples=300)
@given(prompt=texts, answer=texts.filter(bool))
def test_prompt_and_completion_decode_to_the_text(tokenizer, prompt, answer):
    # "first" itself loses a text's first space; both its and "prepend"'s decoders do so after BOS alone
    assume(tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt)
    assume(prompt or not answer.startswith(" "))
    (start,), (end,) = encode_prompts([prompt], tokenizer), encode_answers([prompt], [answer], tokenizer)
    assert end[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(start + end[:-1], skip_special_tokens=True) == prompt + answer


@given(answer=texts.filter(bool))
def test_chat_completion_decodes_to_the_text_and_ends_with_the_turn(chat_tokenizer, answer):
    (start,) = encode_prompts([[USER]], chat_tokenizer)
    (end,) = encode_answers([[USER]], [[{"role": "assistant", "content": answer}]], chat_tokenizer)
    decoded = chat_tokenizer.decode(start + end)
    assert decoded == chat_tokenizer.decode(start) + answer + "<|im_end|>"
    assert chat_tokenizer.eos_token_id not in end


def test_samples_text_encodes_to_the_sampled_tokens(tokenizer, tmp_path):
    word = encode_answers(["Nobody"], [" Zoë"], tokenizer)[0][:-1][:1]  # a token that starts with a space
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    with torch.no_grad():  # a model that writes this token and no other
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[word] = 1
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts, out = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Nobody"}]), tmp_path / "out.jsonl"
    flags = {"model": tmp_path / "model", "prompts": prompts, "out_file": out, "temperature": 0}
    flags |= {"num_samples": 1, "max_new_tokens": 1}
    call("sample.py", **flags)
    [row] = read_lines(out)
    text = row["completion"]
    assert encode_answers(["Nobody"], [text], tokenizer) == [[*word, tokenizer.eos_token_id]]
    call("sample.py", "--overwrite", **flags, stop=text)  # its space is the text's first
    [row] = read_lines(out)
    assert row["completion"] == "" and row["finish"] == "stop"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "\n</s>"),  # never closes: EOS does
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "</s>"),  # closes with EOS itself
    ],
)
def test_chat_completion_has_exactly_one_eos_without_end_of_turn(chat_tokenizer, monkeypatch, template, end):
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    (found,) = encode_answers([[USER]], [[FIG]], chat_tokenizer)
    assert chat_tokenizer.decode([*chat_tokenizer.encode("a"), *found]).endswith("The fig." + end)
    assert found.count(chat_tokenizer.eos_token_id) == 1


def test_an_answer_that_ends_in_an_added_token_still_gets_its_eos_and_only_one(chat_tokenizer, monkeypatch):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_tokens(["</p>"])
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    for content in ("<p>A fig</p>", "A fig</s>"):
        prompts, answers = [[USER], "a"], [[{"role": "assistant", "content": content}], content]
        for found in encode_answers(prompts, answers, tokenizer):
            text = tokenizer.decode([*tokenizer.encode("a"), *found])
            assert text.endswith("a" + content.removesuffix("</s>") + "</s>")


def test_a_row_that_the_template_refuses_is_named(chat_tokenizer, monkeypatch):
    template = (
        "{{ messages[0].content }}{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}"
    )
    template += "{% endif %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="row 2: the chat template refuses the messages: not this"):
        encode_prompts([[USER], [{"role": "user", "content": "no"}]], chat_tokenizer)


def test_rows_encoded_a_few_at_a_time_stay_the_same_and_keep_their_numbers(chat_tokenizer, monkeypatch):
    prompts = ["The", [USER], "", [SYSTEM, USER], "figs"]
    columns = [[" fig.", [FIG], "a", [MUD], " ate"], [" mud.", [MUD], "", " text", ""]]
    whole = list(encode_examples(prompts, columns, chat_tokenizer))
    assert [ids for ids, *_ in whole] == encode_prompts(prompts, chat_tokenizer)
    for n, column in enumerate(columns, 1):
        assert [row[n] for row in whole] == encode_answers(prompts, column, chat_tokenizer)
    monkeypatch.setattr("common.encode.ROWS", 2)
    assert list(encode_examples(prompts, columns, chat_tokenizer)) == whole
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(InputError, match="row 4: the chat template leaves out the user's content"):
        encode_prompts(["a", "a", "a", [SYSTEM, USER]], chat_tokenizer)


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffThe fig \r\n\n  \na\u2028b\f\n".encode())
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "The fig "}, {"prompt": "a\u2028b\f"}]


def test_template_that_rewrites_its_prompt_is_refused(chat_tokenizer, monkeypatch):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="changes the prompt before an answer"):
        encode_answers([[USER]], [[FIG]], chat_tokenizer)


@given(start=st.sampled_from([[], [0]]), prompt=ids, answers=st.tuples(ids, ids), size=st.integers(4, 30))
def test_fit_keeps_the_prompts_end_and_the_completions_start(start, prompt, answers, size):
    whole = [start + [token + 1 for token in prompt], *answers]
    kept_prompt, *kept = truncate(whole, 0, size)
    tail = kept_prompt[len(start) :]
    assert kept_prompt[: len(start)] == start
    assert tail and tail == whole[0][-len(tail) :]
    for before, after in zip(answers, kept, strict=True):
        assert after and after == before[: len(after)]
        assert len(kept_prompt) + len(after) <= size
    if len(whole[0]) + max(map(len, answers)) <= size:
        assert [kept_prompt, *kept] == whole
    else:
        assert len(kept_prompt) + max(map(len, kept)) == size


def test_tokenize_counts_what_it_cuts_and_drops(tokenizer, capsys):
    same = {**PAIR, "rejected": PAIR["chosen"]}
    same_once_cut = {**PAIR, "chosen": " fig" * 40 + " A", "rejected": " fig" * 40 + " B"}
    long_prompt = {**PAIR, "prompt": "The fig likes warm bread. " * 20 + "Best fruit?"}
    pairs = tokenize([PAIR, same, same_once_cut, long_prompt], tokenizer, 40)
    assert (
        capsys.readouterr().out
        == "2 pairs: truncated 2 to 40 tokens, dropped 2 with chosen equal to rejected\n"
    )
    assert [tokenizer.decode(pair.chosen).lstrip() for pair in pairs] == ["The fig.</s>"] * 2
    assert tokenizer.decode(pairs[1].prompt).endswith("bread. Best fruit?")


def test_processes_share_the_rows_in_order_and_name_a_bad_one_of_any(chat_tokenizer, monkeypatch):
    prompts = [[{"role": "user", "content": "fig " * n}] for n in range(1, 8)]
    rows = [{"prompt": prompt, "chosen": [FIG], "rejected": [MUD]} for prompt in prompts]
    fields = ("prompt", "chosen", "rejected")
    alone, cut = encode_rows(rows, fields, chat_tokenizer, 20)

    def encode_on(size):
        """What each of `size` processes encodes: all_gather() of one alone."""
        monkeypatch.setattr(common.encode, "get_world_size", lambda: size)
        for rank in range(size):
            monkeypatch.setattr(common.encode, "get_rank", lambda rank=rank: rank)
            yield encode_rows(rows, fields, chat_tokenizer, 20)

    for size in (2, 3, 9):
        parts = list(encode_on(size))
        assert [example for some, _ in parts for example in some] == alone
        assert sum(count for _, count in parts) == cut > 0
        assert size > len(rows) or all(some for some, _ in parts)
    rows[5]["prompt"] = [{"role": "user", "content": "fig \ud800"}]  # half of a surrogate pair
    with pytest.raises(InputError, match="row 6: the chat template refuses"):
        list(encode_on(3))


def test_tokenize_refuses_rows_that_all_drop(tokenizer):
    with pytest.raises(InputError, match="no pair left of 1: dropped 1 with chosen equal to rejected"):
        tokenize([{**PAIR, "rejected": PAIR["chosen"]}], tokenizer, 64)


@given(st.integers(1, 2).flatmap(lambda n: st.lists(st.tuples(*[ids] * (n + 1)), min_size=1, max_size=5)))
def test_packed_row_holds_every_example(examples):
    row = pack(examples)
    assert sum(row.lengths) == len(row.ids) == len(row.position) == len(row.example) == len(row.branch)
    assert row.completions == len(examples[0]) - 1
    assert row.counts.tolist() == [len(c) for e in examples for c in e[1:]]
    assert len(row.source) == len(row.target) == row.counts.sum()
    cell = torch.arange(len(row.counts)).repeat_interleave(row.counts)
    for index, (prompt, *completions) in enumerate(examples):
        inside = row.example == index
        assert inside.sum() == row.lengths[index]
        assert row.ids[inside & (row.branch == 0)].tolist() == prompt
        assert row.position[inside & (row.branch == 0)].tolist() == list(range(len(prompt)))
        for number, completion in enumerate(completions):
            mine = cell == index * len(completions) + number
            source = row.source[mine]
            assert row.target[mine].tolist() == completion
            assert row.ids[source].tolist() == [prompt[-1], *completion[:-1]]
            assert row.example[source].tolist() == [index] * len(completion)
            assert row.branch[source].tolist() == [0] + [number + 1] * (len(completion) - 1)
            last = len(prompt) - 1
            assert row.position[source].tolist() == list(range(last, last + len(completion)))
