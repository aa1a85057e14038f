"""How much of a model a process holds under FSDP2: bytes of weights, counted between two training steps.

torchrun --nproc_per_node 2 bench/fsdp_memory.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.parallel import all_gather, distributed, get_device, get_world_size, to_local
from core.hub import load_model
from core.lora import add_lora
from core.model import pair_stats, set_forward
from core.pairs import pack


@distributed()
def main() -> None:
    """Print each process's share, frozen base with adapter and all weights trained."""
    for name, rank in (("LoRA, r = 8", 8), ("all weights", 0)):
        model, _ = load_model(ROOT / "data/society/reference")
        if rank:
            add_lora(model, rank, 8.0)
        set_forward(model, get_device(), mixed=False, fsdp=True)
        pair_stats(model, pack([([5, 6], [7, 8, 9], [7, 9])])).logp.sum().backward()
        weights = list(model.parameters())
        held = sum(to_local(weight).untyped_storage().nbytes() for weight in weights)
        shares = all_gather(held / sum(weight.numel() * weight.element_size() for weight in weights))
        print(f"{name}: {get_world_size()} processes hold " + ", ".join(f"{share:.1%}" for share in shares))


if __name__ == "__main__":
    main()
