"""pair_stats against transformers' own forward, text by text, for ten architectures."""

import math

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM, BartConfig, MistralConfig, ModernBertDecoderConfig, Phi3Config

import train_dpl
from common.encode import encode_prompts
from common.files import InputError
from core import attention, checks
from core import model as model_file
from core.attention import block_mask, dense, dense_masks, flex
from core.checks import check_packable, max_positions, probe_ids
from core.hub import load_model, loading
from core.model import pair_stats
from core.pairs import pack
from tiny import CONFIGS, GROUPED, NOT_PACKABLE, REASONS, SIZES, USER, WINDOW, make, make_pairs, plain_stats


@pytest.mark.parametrize("name", CONFIGS)
def test_stats_and_gradients_equal_transformers(name):
    model, pairs = make(CONFIGS[name]), make_pairs()
    check_packable(model, "some/model")
    logp, entropy = plain_stats(model, pairs)
    stats = pair_stats(model, pack(pairs), entropy=True)
    torch.testing.assert_close(stats.logp, logp, atol=1e-4, rtol=0)  # nats a sequence, of about 100
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-4, rtol=0)
    assert stats.length.tolist() == [[len(pair.chosen), len(pair.rejected)] for pair in pairs]

    # every weight: the head and the embedding too, tied or not, through the gradient formed by hand
    names, weights = zip(*model.named_parameters(), strict=True)
    mix = torch.tensor([[1.0, -1.0], [0.3, 2.0], [-0.7, 0.1]])
    for theirs, ours in ((logp, stats.logp), (entropy, stats.entropy)):
        wanted = torch.autograd.grad((theirs * mix).sum(), weights, retain_graph=True)
        found = torch.autograd.grad((ours * mix).sum(), weights, retain_graph=True)
        for weight, a, b in zip(names, wanted, found, strict=True):
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-5, weight


def test_gradient_is_the_numerical_one():
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 3, 10, 7])
    for softcap in (None, 1.5):
        for with_entropy in (False, True):

            def run(h, w, b, softcap=softcap, with_entropy=with_entropy):
                logp, entropy = model_file.TokenLogProbs.apply(h, w, b, target, softcap, with_entropy)
                return (logp, entropy) if with_entropy else logp

            assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_chunking_the_vocabulary_changes_nothing(monkeypatch):
    model, pairs = make(CONFIGS["gemma2"]), make_pairs()
    whole = pair_stats(model, pack(pairs), entropy=True)
    monkeypatch.setitem(model_file.CHUNK, "cpu", 3 * 97)  # three tokens at a time
    chunked = pair_stats(model, pack(pairs), entropy=True)
    torch.testing.assert_close(chunked.logp, whole.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked.entropy, whole.entropy, atol=1e-5, rtol=0)


def test_pairs_packed_together_do_not_see_each_other():
    model, pairs = make(CONFIGS["mistral"]), make_pairs()
    together = pair_stats(model, pack(pairs)).logp
    alone = torch.cat([pair_stats(model, pack([pair])).logp for pair in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_flex_attention_follows_the_same_rule(window, softcap):
    """FlexAttention, which runs on CUDA, has a forward on the CPU to compare with the dense masks."""
    packed = pack(make_pairs())
    torch.manual_seed(0)
    query = torch.randn(1, 4, len(packed.ids), 16)
    key, value = torch.randn(2, 1, 2, len(packed.ids), 16)
    wanted = dense(query, key, value, packed.lengths, dense_masks(packed, window), 0.25, softcap)
    found = flex(query, key, value, block_mask(packed, window), 0.25, softcap)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_packed_model_still_generates():
    model = make(CONFIGS["gemma2"])
    ids = torch.arange(3, 15)[None]
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    pair_stats(model, pack(make_pairs()))
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_models_that_packing_would_change_are_refused(name):
    with pytest.raises(InputError, match=f"cannot be packed: {REASONS.get(name, '')}"):
        check_packable(make(NOT_PACKABLE[name]), "some/model")


@pytest.mark.parametrize("kind", ["sparse", "window"])
def test_attention_to_few_keys_is_compared_on_texts_with_more(kind, monkeypatch):
    """Even if only the comparison could notice it, and however often it is made."""
    if kind == "sparse":
        if "keys chosen by an indexer" not in NOT_PACKABLE:
            pytest.skip("needs a younger transformers")
        monkeypatch.setattr(attention, "KEYWORDS", attention.KEYWORDS | {"indices"})
        model = make(NOT_PACKABLE["keys chosen by an indexer"])
    else:
        rule = attention.attention_rule
        monkeypatch.setattr(attention, "attention_rule", lambda packed, window: rule(packed, None))
        model = make(MistralConfig(**GROUPED, sliding_window=40))
    for _ in range(2):
        with pytest.raises(InputError, match="log-probabilities, in nats, move"):
            check_packable(model, "some/model")


def test_the_comparison_takes_seconds():
    """It is longer than a short window of a small model, and never more than 1e11 weights times tokens."""
    size = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(MistralConfig(**size, sliding_window=4096))
    assert large.num_parameters() > 7e9 and len(probe_ids(large)) == 12
    assert len(probe_ids(make(MistralConfig(**GROUPED, sliding_window=40)))) == 52
    assert len(probe_ids(make(MistralConfig(**GROUPED, sliding_window=4096)))) == 12  # of 128 positions
    assert len(probe_ids(make(CONFIGS["llama"]))) == 12


ODD = {  # configs that transformers checks, and a decoder without layers of that name
    "no None for the padding token": ModernBertDecoderConfig(**SIZES, sliding_window=8),
    "half of an encoder-decoder": BartConfig(vocab_size=97, d_model=32, decoder_layers=2, is_decoder=True),
}


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_whatever_a_model_raises_it_is_refused_in_one_line(config):
    with pytest.raises(InputError, match=r"^--model some/model: \w+ cannot be packed: .+$"):
        check_packable(make(config), "some/model")


def test_positions_stop_where_longrope_would_turn_the_whole_row():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(**GROUPED, original_max_position_embeddings=32, rope_parameters=rope)
    assert max_positions(make(config)) == 32
    assert max_positions(make(CONFIGS["llama"])) == 128
    assert max_positions(make(NOT_PACKABLE["bias by index"])) == math.inf


def rounded(model):
    """A model in bfloat16 whose logits, in the tens, are hard to round: as a trained model's."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.bfloat16()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_bfloat16_models_that_pack_right_are_accepted_and_others_refused(name, monkeypatch):
    model = rounded(make(CONFIGS[name]))
    check_packable(model, "some/model")
    rule = attention.attention_rule

    def sees_the_other_completion(packed, window):
        return rule(packed._replace(branch=packed.branch.clamp(max=0)), window)

    monkeypatch.setattr(attention, "attention_rule", sees_the_other_completion)
    with pytest.raises(InputError, match="log-probabilities, in nats, move"):
        check_packable(model, "some/model")


def test_a_compiler_s_failure_is_not_called_a_wrong_model(monkeypatch):
    def fail(*_):
        raise TorchDynamoException("no C compiler\nmore")

    monkeypatch.setattr(checks, "pair_stats", fail)
    with pytest.raises(InputError, match=r"some/model: torch\.compile failed: no C compiler$"):
        check_packable(make(CONFIGS["llama"]), "some/model")


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_and_sums_of_bfloat16_are_float32(autocast):
    """Under autocast, and with bfloat16 weights: equal to float64 sums of the same rounded numbers."""
    model = make(CONFIGS["llama"])
    model = model if autocast else rounded(model)
    packed, seen = pack(make_pairs()), {}
    model.base_model.register_forward_hook(lambda _, __, out: seen.update(hidden=out.last_hidden_state[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stats = pair_stats(model, packed, entropy=True)
    hidden, weight = (x.bfloat16().double() for x in (seen["hidden"], model.get_output_embeddings().weight))
    log_p = (hidden[packed.source] @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    token = log_p.gather(1, packed.target[:, None])[:, 0]
    for ours, tokens in ((stats.logp, token), (stats.entropy * stats.length, entropy)):
        assert ours.dtype == torch.float32
        sums = torch.stack([part.sum() for part in tokens.split(packed.counts.tolist())])
        torch.testing.assert_close(ours.flatten().double(), sums, atol=1e-3, rtol=1e-5)


def test_gradients_under_autocast_are_those_of_float32_within_rounding():
    model, packed = make(CONFIGS["llama"]), pack(make_pairs())
    gradients = {}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stats = pair_stats(model, packed, entropy=True)
        gradients[autocast] = torch.autograd.grad((stats.logp / stats.length).sum(), model.parameters())
    for exact, rounded_ in zip(*gradients.values(), strict=True):
        assert rounded_.dtype == torch.float32 and (exact - rounded_).norm() < 0.05 * exact.norm()


def interrupt(*_, **__):
    """Ctrl-C."""
    raise KeyboardInterrupt


def test_fault_that_only_a_forward_pass_shows(refused, tiny_model_folder, data, tmp_path, monkeypatch):
    """Whatever a model's own code raises, check_packable finds it before the first step."""
    model, _ = load_model(tiny_model_folder)
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 // 0)
    flags = ["--model", tiny_model_folder, "--data", data, "--out_dir", tmp_path / "run"]
    refused(train_dpl, flags, f"--model {tiny_model_folder}: LlamaForCausalLM cannot be packed: integer div")
    monkeypatch.setattr(type(model.model), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_packable(model, "here")


def test_an_interrupt_is_no_fault_of_a_file(chat_tokenizer, monkeypatch):
    with pytest.raises(KeyboardInterrupt), loading("--model here"):
        interrupt()
    monkeypatch.setattr(chat_tokenizer, "apply_chat_template", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_prompts([[USER]], chat_tokenizer)
