"""Mixtures of experts and DeepSeek's attention: what LoRA adapts, what PEFT loads of it, sampling."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    HunYuanMoEV1Config,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from core.checks import check_packable
from core.lora import add_lora, load_lora, lora_layers, merge_lora, print_share, save_lora
from core.model import pair_stats
from core.pairs import pack
from sample import sample
from tiny import CLOSE, GROUPED, IDS, adapt, logits, make, make_pairs, plain_stats

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CONFIGS = {
    # the first layer is dense, the others have experts and a shared expert
    "glm4_moe": Glm4MoeConfig(**GROUPED, **EXPERTS, head_dim=8, n_routed_experts=4, first_k_dense_replace=1),
    "qwen2_moe": Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    # its kv_b_proj gets (batch, 1, tokens, rank)
    "deepseek_v3": DeepseekV3Config(
        **GROUPED | {"num_key_value_heads": 4},
        **EXPERTS,
        **MLA,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    # routers that are subclasses of nn.Linear and return a tuple, and routers whose weight is looked at
    "phimoe": PhimoeConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "hunyuan_moe": HunYuanMoEV1Config(**GROUPED, head_dim=8, num_experts=4, moe_topk=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_adapters_equal_plain_forwards_in_values_and_gradients(name):
    model, pairs = adapt(make(CONFIGS[name])), make_pairs()
    check_packable(model, name)
    logp, _ = plain_stats(model, pairs)
    packed = pair_stats(model, pack(pairs)).logp
    torch.testing.assert_close(packed, logp, atol=1e-4, rtol=0)  # nats a sequence, of about 100
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted, found = (torch.autograd.grad(x[:, 0].sum() - x[:, 1].sum(), weights) for x in (logp, packed))
    for a, b in zip(wanted, found, strict=True):
        assert a.norm() > 0 and (a - b).norm() <= 1e-3 * a.norm() + 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_compute_the_same(name):
    model = adapt(make(CONFIGS[name]))
    adapted = logits(model)
    torch.testing.assert_close(logits(merge_lora(model)), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_every_layer(name, tmp_path):
    """PEFT takes gate_proj, up_proj and down_proj of some of these for experts, and drops their weights."""
    base = make(CONFIGS[name])
    ours = adapt(base, dropout=0.05)
    save_lora(ours, tmp_path, "base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), logits(ours), **CLOSE)
    torch.testing.assert_close(logits(load_lora(base, tmp_path)), logits(ours), **CLOSE)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    count = len(config["target_modules"]) + len(config["target_parameters"] or [])
    assert count == len(dict(lora_layers(ours)))


def test_the_share_that_lora_adapts_is_printed_if_experts_are_left_out(capsys):
    print_share(add_lora(make(MixtralConfig(**GROUPED, num_local_experts=4)), 4, 8))
    experts, attention = 3 * 4 * 3 * 32 * 48, 3 * (32 * 32 * 2 + 32 * 16 * 2)
    total = experts + attention + 2 * 97 * 32 + 3 * 4 * 32 + 7 * 32  # embedding, head, routers, norms
    line = f"LoRA adapts {attention / total:.0%} of the weights; the experts, {experts / total:.0%}, stay"
    assert capsys.readouterr().out.startswith(line)
    print_share(add_lora(make(DENSE), 4, 8))
    assert not capsys.readouterr().out


DENSE = Glm4MoeConfig(**GROUPED, head_dim=8, first_k_dense_replace=3)


@pytest.mark.parametrize("flag", [False, True])
def test_a_mixture_is_sampled_whether_or_not_it_returns_router_logits(flag):
    """Fine-tuned ones often do: it gives a second loss, which needs an attention mask."""
    model, other = (
        make(MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=on)) for on in (flag, False)
    )
    prompt = IDS[0].tolist()
    wanted = other.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(prompt) :]
    assert sample(model, prompt, 1, 8, None, temperature=0)[0].tokens == wanted.tolist()
