"""Quality of samples: reward under a reward model, and cross-entropy to the reference policy.

The cross-entropy is -log pi_ref, in nats per text and per token. The end token counts, except of a text that
sample.py cut before it.

    python evaluate.py quality --samples dpl.jsonl --baseline dpo.jsonl --reward_model out/reward
"""

from dataclasses import dataclass

from common.encode import encode_examples
from common.files import error_prefix
from common.flags import flag, require
from common.parallel import get_device, get_dtype
from common.rows import to_texts
from core.checks import check_packable
from core.hub import load_model
from core.reference import score_completions
from metrics.tables import (
    Columns,
    SamplesConfig,
    flatten,
    prompt_means,
    read_files,
    report_means,
    sample_rewards,
)


@dataclass
class Config(SamplesConfig):
    """Flags of evaluate.py quality."""

    reward_model: str | None = flag(None, "Folder or hub name of a decoder with a head 'score' of one label.")
    reference: str | None = flag(None, "Folder or hub name of the reference policy.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "reference", self.reference or self.reward_model, "given, or --reward_model, or both")


def run(config: Config) -> None:
    """Print both, as means over prompts."""
    files = read_files(config)
    columns: list[Columns] = [{} for _ in files]
    if config.reward_model:
        rewards = sample_rewards(files, config.reward_model, config.chat)
        for column, groups, reward in zip(columns, files, rewards, strict=True):
            column["reward"] = prompt_means(reward, groups)
    if config.reference:
        with error_prefix("--reference"):
            model, tokenizer = load_model(config.reference, str(get_device()), get_dtype())
            check_packable(model, config.reference)
            for column, groups in zip(columns, files, strict=True):
                samples = flatten(groups)
                prompts, answers, options = to_texts(samples, config.chat)
                is_cut = [sample.finish in ("length", "stop") for sample in samples]
                examples = encode_examples(prompts, [answers], tokenizer, options, is_cut)
                encoded = list(zip(*examples, strict=True))
                nats = prompt_means(-score_completions(model, *encoded), groups)
                tokens = prompt_means([len(ids) for ids in encoded[1]], groups)
                column["cross-entropy, nats per text"] = nats
                column["cross-entropy, nats per token"] = nats / tokens
                column["tokens per text"] = tokens
    report_means(config, columns, files)
