"""Reward models: equal to the sequence classifiers of transformers when trained, written and scored."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sample
import train_reward
from common.files import InputError
from core import attention
from core.checks import check_packable
from core.hub import load_model, load_reward_model
from core.model import Stats, pair_stats, set_forward
from core.pairs import Pair, pack
from scripts import run_script, train
from tiny import CONFIGS, FIG, MUD, NOT_PACKABLE, PAIR, PAIRS, REASONS, USER, lines, make, make_pairs
from train_reward import encode_texts, load_texts, objective, score_texts


def make_scorer(config):
    """A random reward model in eval mode."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    model = make(config, AutoModelForSequenceClassification)
    model.config.pad_token_id = 0  # no text of make_pairs() has it
    return model


def padded_scores(model, texts, side="right"):
    """transformers' own scores, (texts,), of one padded batch."""
    longest = max(map(len, texts))
    pads = [[0] * (longest - len(text)) for text in texts]
    rows = [text + pad if side == "right" else pad + text for text, pad in zip(texts, pads, strict=True)]
    ids = torch.tensor(rows)
    mask = (ids != 0).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=position).logits[:, 0]


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"olmo2"}))  # transformers has no classifier for it
def test_packed_rewards_and_gradients_equal_transformers(name):
    pairs, model = make_pairs(), make_scorer(CONFIGS[name])
    texts = [prompt + text for prompt, *both in pairs for text in both]
    weights = dict(model.named_parameters())
    plain = padded_scores(model, texts)
    grads = torch.autograd.grad(
        objective(Stats(plain.view(-1, 2), None), None, center=0.1)["loss"].sum(), weights.values()
    )
    check_packable(model, name)
    fed = [Pair(p, c + [5], r + [7]) for p, c, r in pairs]  # the last ids are never fed
    packed = pair_stats(model, pack(fed))
    torch.testing.assert_close(packed.logp.flatten(), plain, atol=2e-4, rtol=2e-4)
    assert packed.length.tolist() == [[len(c) + 1, len(r) + 1] for _, c, r in pairs]
    loss = objective(packed, None, center=0.1)["loss"].sum()
    for (key, _), ours, theirs in zip(
        weights.items(), torch.autograd.grad(loss, weights.values()), grads, strict=True
    ):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5, key


CLASSIFIERS = AutoModelForSequenceClassification._model_mapping
REFUSED = {name for name in NOT_PACKABLE if type(NOT_PACKABLE[name]) in CLASSIFIERS}


@pytest.mark.parametrize("name", sorted(REFUSED - {"positions that start behind the padding token's"}))
def test_models_that_packing_would_change_are_refused(name):
    """Also under a new head, whose rewards are all 0. (RoBERTa's head is no `score`.)"""
    model = make_scorer(NOT_PACKABLE[name])
    torch.nn.init.zeros_(model.score.weight)
    with pytest.raises(InputError, match=f"cannot be packed: {REASONS.get(name, '')}"):
        check_packable(model, "some/model")


def test_bfloat16_models_that_pack_right_are_accepted_and_others_refused(monkeypatch):
    model, rule = make_scorer(CONFIGS["mistral"]).bfloat16(), attention.attention_rule
    check_packable(model, "some/model")

    def sees_the_other_completion(packed, window):
        return rule(packed._replace(branch=packed.branch.clamp(max=0)), window)

    monkeypatch.setattr(attention, "attention_rule", sees_the_other_completion)
    with pytest.raises(InputError, match="hidden states move"):
        check_packable(model, "some/model")


def test_bradley_terry_loss():
    scores = torch.tensor([[1.0, -0.5], [0.2, 2.0]], requires_grad=True)
    values = objective(Stats(scores, None), None, center=0.0)
    expected = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.8))]
    torch.testing.assert_close(values["loss"], torch.tensor(expected))
    assert values["reward_margin"].tolist() == pytest.approx([1.5, -1.8])
    centred = objective(Stats(scores, None), None, center=0.5)["loss"] - values["loss"]
    torch.testing.assert_close(centred, torch.tensor([0.5 * 0.5**2, 0.5 * 2.2**2]))


def full_texts(*args):
    """Token ids of whole texts, without the padding token at the end."""
    return [start + end[:-1] for start, end in encode_texts(*args)]


def test_learns_the_log_odds_of_the_preferences(tiny_model_folder, tmp_path):
    """Four of five raters prefer " The fig.": the margin goes to log 4, and the centring term halves it."""
    swapped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    (tmp_path / "pairs.jsonl").write_bytes(lines(*[PAIR] * 4, swapped))
    flags = {"model": tiny_model_folder, "data": tmp_path / "pairs.jsonl", "batch_size": 5, "lora_dropout": 0}
    flags |= {"max_steps": 150, "lr": 3e-3, "warmup_steps": 0, "center": 0.01, "schedule": "linear"}
    rows = train(train_reward, **flags, out_dir=tmp_path / "run")
    model, tokenizer = load_reward_model(str(tmp_path / "run"))
    fig, mud = score_texts(model, tokenizer, ["Best fruit?"] * 2, [" The fig.", " Mud."])
    assert fig - mud == pytest.approx(math.log(4), abs=0.02)
    assert fig + mud == pytest.approx(0, abs=0.02)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at zero
    assert not any(name.startswith("logp") for name in rows[-1])


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_written_loads_in_transformers_and_peft(rank, tiny_model_folder, tmp_path, data):
    run = str(tmp_path / "run")
    flags = {"model": tiny_model_folder, "data": data, "lora_rank": rank, "max_steps": 4, "out_dir": run}
    rows = train(train_reward, **flags, eval_data=data, lr=1e-2, warmup_steps=0)
    model, tokenizer = load_reward_model(run)
    prompts, answers = [p["prompt"] for p in PAIRS], [p["chosen"] for p in PAIRS]
    ours = score_texts(model, tokenizer, prompts, answers)
    assert abs(ours).min() > 1e-3  # the head has moved away from zero
    others = [AutoModelForSequenceClassification.from_pretrained(run, num_labels=1)]
    if rank:
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1)
        others.append(PeftModel.from_pretrained(base, run))
    ids = full_texts(prompts, answers, AutoTokenizer.from_pretrained(run))
    for other in others:
        other = other.eval()
        theirs = [other(torch.tensor([text])).logits.item() for text in ids]
        assert ours.tolist() == pytest.approx(theirs, abs=1e-5)
    assert "eval_reward_accuracy" in rows[-1]


@pytest.mark.parametrize("rank", [0, 4])
def test_bfloat16_trains_nearly_as_float32_does(rank, tiny_model_folder, tmp_path, data):
    flags = {"model": tiny_model_folder, "data": data, "lora_rank": rank, "max_steps": 4, "lora_dropout": 0}
    rows = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        rows[dtype] = train(train_reward, **flags, dtype=dtype, lr=1e-2, warmup_steps=0, out_dir=out)
    float32, bfloat16 = ([row["reward_margin"] for row in rows[dtype]] for dtype in rows)
    assert abs(float32[-1]) > 0.1 and bfloat16 != float32
    assert bfloat16 == pytest.approx(float32, rel=0.1, abs=0.01)  # 8 bits, and Adam's steps of lr


def test_an_adapter_s_head_keeps_its_digits_beside_a_bfloat16_base(tiny_model_folder, tmp_path, data):
    flags = {"model": tiny_model_folder, "data": data, "max_steps": 2, "lr": 1e-2, "warmup_steps": 0}
    train(train_reward, **flags, out_dir=tmp_path / "run")
    float32, bfloat16 = (
        load_reward_model(tmp_path / "run", dtype=x)[0] for x in (torch.float32, torch.bfloat16)
    )
    assert bfloat16.dtype == torch.bfloat16 and torch.equal(bfloat16.score.weight, float32.score.weight)


def test_rewards_have_the_digits_of_float32_where_products_are_bfloat16(tiny_model_folder):
    model, _ = load_reward_model(str(tiny_model_folder))
    torch.nn.init.normal_(model.score.weight)
    set_forward(model, torch.device("cpu"), mixed=True, fsdp=False)
    rewards = pair_stats(model, pack(make_pairs())).logp
    assert not torch.equal(rewards, rewards.bfloat16().float())


def test_a_run_goes_on_from_a_reward_model(tiny_model_folder, tmp_path, data):
    """A reward model may be trained further: --model is then a sequence classifier, not a causal LM."""
    flags = {"data": data, "max_steps": 2, "lr": 1e-2, "warmup_steps": 0, "lora_rank": 0}
    train(train_reward, **flags, model=tiny_model_folder, out_dir=tmp_path / "first")
    train(train_reward, **flags | {"lr": 1e-9}, model=tmp_path / "first", out_dir=tmp_path / "second")
    first, second = (load_reward_model(str(tmp_path / name))[0] for name in ("first", "second"))
    torch.testing.assert_close(first.score.weight, second.score.weight, atol=1e-6, rtol=0)
    assert first.score.weight.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_padding_does_not_change_a_score(name):
    model = make_scorer(CONFIGS[name])
    texts = [prompt + text for prompt, *both in make_pairs() for text in both]
    alone = torch.stack([model(torch.tensor([text])).logits[0, 0] for text in texts])
    for side in ("left", "right"):
        torch.testing.assert_close(padded_scores(model, texts, side), alone, atol=2e-4, rtol=2e-4)


def test_score_texts_is_the_same_for_any_batch_and_padding_side(tiny_model_folder):
    model, tokenizer = load_reward_model(str(tiny_model_folder))
    torch.nn.init.normal_(model.score.weight)
    prompts = ["Best fruit?", "A café?", "My friend likes"] * 4
    answers = [" The fig." * n for n in range(1, 13)]
    tokenizer.padding_side = "left"
    together = score_texts(model, tokenizer, prompts, answers)
    tokenizer.padding_side = "right"
    alone = [score_texts(model, tokenizer, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(together.round(4))) == 12


def test_texts_have_one_bos_and_end_as_the_chat_template_ends(chat_tokenizer):
    for text in full_texts([[USER]], [[FIG]], chat_tokenizer):
        assert text.count(chat_tokenizer.bos_token_id) == 1
        end = chat_tokenizer.decode(text).replace("> \n", ">\n")  # SentencePiece adds the space
        assert end.endswith("The fig.<|im_end|>\n")
    [plain] = full_texts(["Best fruit?"], [" The fig."], chat_tokenizer)
    assert plain[-1] == chat_tokenizer.eos_token_id and plain.count(plain[-1]) == 1


def test_the_shared_start_is_computed_once(chat_tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines({"prompt": [USER], "chosen": [FIG], "rejected": [MUD]}))
    chat_tokenizer.pad_token = "<unk>"
    [pair] = load_texts(str(path), chat_tokenizer, 64)
    chosen, rejected = (full_texts([[USER]], [[answer]], chat_tokenizer)[0] for answer in (FIG, MUD))
    pad = [chat_tokenizer.pad_token_id]
    assert [*pair.prompt, *pair.chosen] == chosen + pad and [*pair.prompt, *pair.rejected] == rejected + pad
    assert pair.chosen[0] != pair.rejected[0]


def test_two_processes_train_the_same_reward_model(tiny_model_folder, tmp_path, data):
    flags = {"model": tiny_model_folder, "data": data, "max_steps": 3, "lr": 1e-2, "warmup_steps": 0}
    flags |= {"batch_size": 3, "lora_dropout": 0}
    train(train_reward, **flags, out_dir=tmp_path / "one")
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--out_dir", tmp_path / "two", "--parallel", "fsdp"]
    codes, _, stderr = run_script(2, "train_reward.py", *words)
    assert codes == [0, 0], stderr
    one, two = (load_reward_model(str(tmp_path / name))[0].state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_a_reward_model_is_no_policy(tiny_model_folder, tmp_path, data, refused):
    flags = {"model": tiny_model_folder, "data": data, "out_dir": tmp_path / "run"}
    train(train_reward, **flags, max_steps=1, warmup_steps=0)
    with pytest.raises(InputError, match=r"unexpected tensor .*score"):
        load_model(tmp_path / "run")
    refused(sample, ["--model", tmp_path / "run"], "score")


def test_a_text_that_is_one_token_without_its_padding(tiny_model_folder):
    """The end token pads, as in GPT-2, and the answer is nothing else."""
    model, tokenizer = load_reward_model(str(tiny_model_folder))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    tokenizer.pad_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    ids = tokenizer("T", return_tensors="pt").input_ids
    assert ids.shape == (1, 1)
    ours = score_texts(model, tokenizer, ["T", "T"], ["</s>", " The fig."])
    assert ours[0] == pytest.approx(model(ids).logits.item(), abs=1e-5) != ours[1]
