"""Time and memory of a gradient against everything they depend on, beside the floor of arithmetic.

The gradient of a batch's DPO loss, for a small random Llama with LoRA. One size varies, the others stay as in
`Case`. With N weights in the layers, L in the adapter, F tokens fed, P tokens predicted and A pairs of tokens
of which one attends to the other, the floor is

    [ F (4 N + 6 L)  +  4 P hidden vocabulary  +  12 A hidden layers ] / (FLOP/s of a large matrix product)

Prompts are fed once per pair. Memory is what a pass adds to the process that holds model and adapter: it
depends on the tokens in a forward pass, not on the number of pairs.

    python bench/scaling.py          # writes assets/scaling.png; eight minutes on two cores
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from machine import DEVICE, DTYPE, apart, clock, product_rate

from common.flags import Flags, flag, parse, run_command
from common.logs import peak_memory
from core.lora import add_lora
from core.model import Stats
from core.pairs import Pair, count_tokens, default_micro_batch_tokens
from core.trainer import forward_backward
from train_dpl import DPLConfig, objective

HIDDEN, LAYERS = 256, 8
SWEEPS = {
    "completion": [16, 64, 256, 1024, 4096, 8192],
    "prompt": [16, 64, 256, 1024, 4096],
    "pairs": [1, 4, 16, 64],
    "vocabulary": [2048, 4096, 8192, 16384, 32768],
    "rank": [4, 8, 16, 32, 64],
}
LABELS = ("completion, tokens", "prompt, tokens", "pairs in the batch", "vocabulary, tokens", "rank of LoRA")


@dataclass
class ScalingConfig(Flags):
    """Flags of bench/scaling.py."""

    out_file: str = flag(str(ROOT / "assets/scaling.png"), "Where to draw.")
    passes: int = flag(3, "Warm passes at each size, the fastest counts; one of long passes.", "[1, inf)")


@dataclass(frozen=True)
class Case:
    """What is computed: the length of every prompt and completion, and the sizes."""

    completion: int = 64
    prompt: int = 64
    pairs: int = 1
    vocabulary: int = 8192
    rank: int = 16


def time_gradient(case: Case, passes: int) -> tuple[float, float, float]:
    """(seconds, MB added by the passes, seconds of the floor) of one gradient."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "vocab_size": case.vocabulary, "tie_word_embeddings": True}
    sizes |= {"max_position_embeddings": case.prompt + case.completion}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=DTYPE).to(DEVICE).eval()
    weights = sum(p.numel() for p in model.model.layers.parameters())
    add_lora(model, case.rank, case.rank)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rng = np.random.default_rng(0)
    lengths = (case.prompt, case.completion, case.completion)
    pairs = [
        Pair(*(rng.integers(3, case.vocabulary, n).tolist() for n in lengths)) for _ in range(case.pairs)
    ]
    zeros = torch.zeros(case.pairs, 2)
    reference = Stats(zeros, zeros + case.completion, zeros)
    dpo = partial(objective, config=DPLConfig(alpha=0.1, beta=0.1))
    before, tokens = peak_memory(DEVICE), default_micro_batch_tokens(DEVICE)

    def run() -> None:
        forward_backward(model, pairs, range(case.pairs), reference, dpo, tokens)
        model.zero_grad()

    first = clock(run)
    seconds = min(clock(run) for _ in range(passes if first < 10 else 1))
    fed = sum(map(count_tokens, pairs))
    predicted = 2 * case.pairs * case.completion
    flops = fed * (4 * weights + 6 * adapter) + 4 * predicted * HIDDEN * case.vocabulary
    p, c = case.prompt, case.completion - 1  # tokens fed
    attended = case.pairs * (p * (p + 1) / 2 + 2 * c * (p + (c + 1) / 2))
    flops += 12 * attended * HIDDEN * LAYERS
    return seconds, 1e3 * (peak_memory(DEVICE) - before), flops / product_rate()


def draw(results: dict[str, np.ndarray], path: Path) -> None:
    """A column for each size: seconds above, memory below; readable in grey."""
    figure, axes = plt.subplots(
        2, len(SWEEPS), figsize=(14, 5.5), sharex="col", sharey="row", layout="constrained"
    )
    for (name, values), label, (upper, lower) in zip(SWEEPS.items(), LABELS, axes.T, strict=True):
        seconds, memory, floor = results[name].T
        upper.loglog(values, seconds, "ko-", label="measured")
        upper.loglog(values, floor, "--", color="0.5", label="floor")
        upper.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        lower.loglog(values, memory, "ko-")
        lower.set_yticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
        lower.set(xlabel=label)
        lower.set_xticks(values, map(str, values), rotation=45)
        upper.minorticks_off()
        lower.minorticks_off()
    axes[0, 0].set(ylabel="one gradient, seconds")
    axes[1, 0].set(ylabel="memory added, MB")
    axes[0, 0].legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Measure every size, each in a process of its own, print and draw."""
    config, results = parse(ScalingConfig, __doc__), {}
    print(", ".join(f"{name} {value}" for name, value in asdict(Case()).items()), "but for one of them:")
    bar = tqdm(total=sum(map(len, SWEEPS.values())), unit="size", disable=None)
    for name, values in SWEEPS.items():
        rows = []
        for value in values:
            rows.append(apart(time_gradient, replace(Case(), **{name: value}), config.passes))
            seconds, memory, floor = rows[-1]
            share = f"the floor is {floor / seconds:.0%} of it"
            tqdm.write(f"{name:10} {value:6,}: {seconds:6.2f} s, {share}, {memory:6.0f} MB")
            bar.update()
        results[name] = np.array(rows)
    bar.close()
    draw(results, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
