"""Supervised fine-tuning against transformers' own loss, on every form of row."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.encode import encode_rows
from common.rows import read_examples
from scripts import SOCIETY, call, read_lines, train
from tiny import CHATML, lines

QUESTIONS = ["Best fruit?", "Who sings?", "What is warm?"]
ANSWERS = ["The fig.", "My friend sings about the best fruit.", "Bread"]


def as_strings(question, answer):
    return {"prompt": question, "completion": f" {answer}"}


def as_messages(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def as_prompt_and_completion(question, answer):
    messages = as_messages(question, answer)["messages"]
    return {"prompt": messages[:1], "completion": messages[1:]}


@pytest.mark.parametrize("form", [as_strings, as_messages, as_prompt_and_completion])
def test_sft_starts_at_the_loss_of_transformers_and_lowers_it(tiny_model_folder, tmp_path, form):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model_folder), tmp_path / "model"
    tokenizer.chat_template = CHATML
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [form(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    flags = {"model": model, "data": tmp_path / "rows.jsonl", "out_dir": tmp_path / "run", "lora_rank": 0}
    metrics = train("train_sft.py", **flags, max_steps=20, lr=4e-3, warmup_steps=2, log_every=1)

    def mean_loss(folder):
        llama, total = AutoModelForCausalLM.from_pretrained(folder), 0.0
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            if form is as_strings:
                start, end = question, f" {answer}</s>"
            else:
                start = f"<s><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                end = f"{answer}<|im_end|>"
            head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (start, end))
            labels = torch.tensor([[-100] * len(head) + tail])
            total += llama(torch.tensor([head + tail]), labels=labels).loss.item() * len(tail)
        return total / len(QUESTIONS)

    assert metrics[0]["loss"] == pytest.approx(mean_loss(tiny_model_folder), rel=1e-5)
    assert metrics[-1]["loss"] == pytest.approx(mean_loss(tmp_path / "run"), rel=1e-5)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]


@pytest.mark.parametrize(("limit", "finish"), [(9, "length"), (64, "eos")])
def test_what_was_sampled_is_what_is_trained(tmp_path, limit, finish):
    """A text that was cut has no end token, in training as in sampling."""
    flags = {"model": SOCIETY, "prompts": "data/society/story.jsonl", "num_samples": 8, "temperature": 0.5}
    call("sample.py", **flags, max_new_tokens=limit, out_file=tmp_path / "samples.jsonl")
    rows, tokenizer = read_lines(tmp_path / "samples.jsonl"), AutoTokenizer.from_pretrained(SOCIETY)
    assert {row["finish"] for row in rows} == {finish}
    examples = read_examples(tmp_path / "samples.jsonl")
    encoded, _ = encode_rows(examples, ("prompt", "completion"), tokenizer, 256)
    for row, (_, ids) in zip(rows, encoded, strict=True):
        assert len(ids) == row["tokens"]
        assert (ids[-1] == tokenizer.eos_token_id) == (finish == "eos")
