"""What tests share: rows of text, tokenizers of the kinds in use, random models, and TRL's trainer on one."""

import copy
import gzip
import json
import math
from itertools import product

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
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
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from common.files import ROOT
from core.lora import add_lora, lora_layers
from core.model import Stats, pair_stats
from core.pairs import Pair, pack
from train_mallows import log_link

# ---- rows

USER, FIG, MUD = (
    {"role": role, "content": text}
    for role, text in (("user", "Best fruit?"), ("assistant", "The fig."), ("assistant", "Mud."))
)
PAIR = {"prompt": "Best fruit?", "chosen": " The fig.", "rejected": " Mud."}
PAIRS = [PAIR, {**PAIR, "prompt": "A café?"}, {**PAIR, "chosen": " A grey cat likes the fig."}]


def lines(*rows):
    """Rows as the bytes of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def first_pairs(name, count, path):
    """Write the first pairs of one of the society's files to `path`."""
    rows = gzip.decompress((ROOT / f"data/society/{name}.jsonl.gz").read_bytes()).splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:count]))
    return path


# ---- tokenizers

SUBJECTS = ("The fig", "A grey cat", "My friend", "Every baker", "Zoë")
VERBS = ("is", "likes", "sings about", "does not want")
OBJECTS = ("the best fruit.", "a café!", "warm bread?\n", "  two spaces", "\n\nHuman: hello\n\nAssistant:")
SENTENCES = [" ".join(words) for words in product(SUBJECTS, VERBS, OBJECTS)]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """BPE as in GPT-2 ("bytes"), Llama 2 ("prepend": BOS, a space before every text) or Mistral ("first")."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if kind == "bytes":
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        extra, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    else:
        bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind == "prepend":
            bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        bpe.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        extra, alphabet = [f"<0x{byte:02X}>" for byte in range(256)], []
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + extra, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]  # byte tokens are ordinary ones
    bpe, ends = Tokenizer.from_str(json.dumps(state)), {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", **ends)


# ---- models

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = 7  # shorter than every pair of make_pairs()
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
    # its linear layers are Conv1D, its head is tied to the embedding
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}
TWICE = {"two attentions a layer": DiffLlamaConfig(**GROUPED)}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
NOT_PACKABLE = {
    "bias by index": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "chunks by index": Llama4TextConfig(
        **GROUPED, **EXPERTS, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8
    ),
    "sinks": GptOssConfig(**GROUPED | {"intermediate_size": 32}, **EXPERTS, head_dim=8, sliding_window=6),
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


def make(config, auto=AutoModelForCausalLM):
    """A random model in eval mode, its weights tripled so that attention is far from uniform."""
    torch.manual_seed(0)
    model = auto.from_config(copy.deepcopy(config)).eval()  # which may write into it
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def make_pairs():
    """Three pairs of random ids, with prompts and completions of 1 to 20 of them."""
    random = torch.Generator().manual_seed(1)
    sizes = ((12, 9, 15), (3, 1, 20), (20, 2, 2))
    return [Pair(*(torch.randint(3, 97, (n,), generator=random).tolist() for n in size)) for size in sizes]


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


RANK, ALPHA = 4, 8
IDS = torch.arange(24).view(2, 12) * 7 % 97
# float32 sums in another order differ in the last bits; logits and gradients here are of size 1
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapt(base, targets=None, dropout=0.0):
    """A copy of `base` with an adapter whose B is not zero."""
    model = add_lora(copy.deepcopy(base), RANK, ALPHA, dropout, targets)
    torch.manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---- log-probabilities, and TRL


def one_pair(chosen, rejected, dtype=torch.float64, length=(1, 1)):
    """Stats of a pair from its two log-probabilities."""
    return Stats(torch.tensor([[chosen, rejected]], dtype=dtype), torch.tensor([length], dtype=dtype))


def some_stats(*shape):
    """Random Stats (*shape, 2) of a policy and a reference."""
    torch.manual_seed(0)
    return [
        Stats(-10 * torch.rand(*shape, 2), torch.randint(1, 9, (*shape, 2)).float(), torch.rand(*shape, 2))
        for _ in range(2)
    ]


def make_policy_and_reference():
    torch.manual_seed(0)
    reference = LlamaForCausalLM(CONFIGS["llama"]).eval()
    policy = copy.deepcopy(reference)
    for p in policy.parameters():  # so that log-ratios are of size 1
        p.data += 0.05 * torch.randn_like(p)
    return policy, reference


def make_trainer(folder, policy, reference, **flags):
    """TRL's trainer on ten pairs of random words, completions from 1 to 9 of them long."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # seconds, which most tests need not wait

    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(95))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    generator = torch.Generator().manual_seed(0)

    def text(low, high):
        count = torch.randint(low, high, (), generator=generator)
        return "".join(f" w{i}" for i in torch.randint(95, (count,), generator=generator))

    rows = [{"prompt": text(2, 9), "chosen": text(1, 10), "rejected": text(1, 10)} for _ in range(10)]
    flags |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return DPOTrainer(
        model=copy.deepcopy(policy),  # TRL replaces its model's forward
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(output_dir=str(folder), **flags),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def check_against_trl(folder, objective, **flags):
    """Loss and gradient of an objective on a random policy are those of TRL's trainer with its `flags`."""
    policy, reference = make_policy_and_reference()
    trainer = make_trainer(folder, policy, reference, **flags)
    rows = list(trainer.train_dataset)
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()

    packed = pack([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows])
    with torch.no_grad():
        known = pair_stats(reference, packed)
    losses = objective(pair_stats(policy, packed), known)["loss"]
    losses.mean().backward()

    assert abs(expected.item() - math.log(2)) > 1e-3  # the policy is not the reference
    # float32, sums in another order: about 1e-6 of the loss, and 4e-6 of the gradient, is seen
    torch.testing.assert_close(losses.mean(), expected, atol=1e-5, rtol=1e-5)
    theirs = dict(trainer.model.named_parameters())
    gap = sum((p.grad - theirs[name].grad).square().sum() for name, p in policy.named_parameters()).sqrt()
    size = sum(p.grad.square().sum() for p in theirs.values()).sqrt()
    assert gap < 1e-4 * size


def phi_link(s, phi):
    """g(s) of equation 13, exact; `phi` broadcasts against s."""
    return log_link(s, phi, "exact", "auto").exp().to(s.dtype)
