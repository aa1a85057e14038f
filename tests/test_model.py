"""pair_stats against transformers' own forward, text by text, for ten architectures."""

import math

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    Olmo2Config,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

import attention
import checks
import model as model_file
from attention import block_mask, dense, dense_masks, flex
from checks import check_packable, max_positions, probe_ids
from common.files import InputError
from model import pair_stats
from pairs import Pair, pack

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = 7  # shorter than every pair below
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "llama_tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(
        **GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=2.0,
    ),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=WINDOW),
    "phi3": Phi3Config(**GROUPED, sliding_window=WINDOW),
    "olmo2": Olmo2Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


def make(config):
    """A random model in eval mode, its weights tripled so that attention is far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def make_pairs():
    random = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, 97, (n,), generator=random).tolist()  # noqa: E731
    return [
        Pair(draw(12), draw(9), draw(15)),
        Pair(draw(3), draw(1), draw(20)),
        Pair(draw(20), draw(2), draw(2)),
    ]


def plain_stats(model, pairs):
    """(logp, entropy), each (pairs, 2): one eager forward for each text, the library's own masks."""
    model.set_attn_implementation("eager")
    logp, entropy = [], []
    for prompt, *completions in pairs:
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logp.append(logits.gather(1, ids[0, len(prompt) :, None]).sum())
            entropy.append(-(logits.exp() * logits).sum(-1).mean())
    return torch.stack(logp).view(-1, 2), torch.stack(entropy).view(-1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_stats_and_gradients_equal_transformers(name):
    model, pairs = make(CONFIGS[name]), make_pairs()
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
    wanted = dense(query, key, value, dense_masks(packed, window), 0.25, softcap)
    found = flex(query, key, value, block_mask(packed, window), 0.25, softcap)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_packed_model_still_generates():
    model = make(CONFIGS["gemma2"])
    ids = torch.arange(3, 15)[None]
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    pair_stats(model, pack(make_pairs()))
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)


BIASED = {
    "bias by index": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "chunks by index": Llama4TextConfig(
        **GROUPED,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "sinks": GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
    ),
}
TWICE = {"two attentions a layer": DiffLlamaConfig(**GROUPED)}
NOT_PACKABLE = BIASED | {
    "recurrent": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
    "partly recurrent": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "full_attention"]),
    "window in the mask alone": PhimoeConfig(**GROUPED, sliding_window=WINDOW, num_local_experts=2),
    "a mask of its own": DogeConfig(**GROUPED, keep_window_size=8),
    "attention past the interface": FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "both directions": Gemma3TextConfig(**GROUPED, head_dim=8, use_bidirectional_attention=True),
    "positions that start behind the padding token's": RobertaConfig(**SIZES, is_decoder=True),
}
if "deepseek_v32" in CONFIG_MAPPING:  # younger than transformers 5.0; every query attends to 16 keys
    sizes = {"index_topk": 16, "index_n_heads": 2, "index_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 8}
    sizes |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 3}
    sizes |= SIZES | {"num_key_value_heads": 4}
    NOT_PACKABLE["keys chosen by an indexer"] = CONFIG_MAPPING["deepseek_v32"](**sizes)
REASONS = {
    "sinks": "its attention takes more than is packed here: s_aux",
    "keys chosen by an indexer": "its attention takes more than is packed here: indices",
    "a mask of its own": "its attention changes the mask",
    "attention past the interface": "only 0 of its 2 layers use transformers' attention interface",
    "partly recurrent": "only 2 of its 3 layers use transformers' attention interface",
}


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
        with pytest.raises(InputError, match="log-probabilities move"):
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
    assert max_positions(make(BIASED["bias by index"])) == math.inf


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_pack_right_are_accepted(name):
    check_packable(make(CONFIGS[name]), "some/model")


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
    with pytest.raises(InputError, match="log-probabilities move"):
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
