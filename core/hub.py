"""Models and tokenizers, from a folder or the hub, and back into a folder. Only safetensors are read."""

import contextlib
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from common.files import TOKENIZER_FILES, InputError, atomic_write, digest_file, digest_json, write_json
from common.parallel import full_tensor, get_rank, get_world_size
from core.lora import find_base, load_lora, merge_lora, model_folders, save_lora
from core.model import float32_score

transformers_logging.disable_progress_bar()  # a small model loads faster than its bar draws
MAX_LAYERS = 10_000


def digest_weights(path: str) -> str:
    """SHA-256 of the files of weights in a model's folder, and in its base's if it is an adapter's."""
    files = [file for folder in model_folders(path) for file in sorted(folder.glob("*.safetensors"))]
    return digest_json([digest_file(file) for file in files])


def load_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32, reward: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer from a folder or the hub. An adapter's folder gives its base, merged.

    In bfloat16 the adapter stays beside its base, as it was trained: merged, its small updates would be
    rounded away. (If that base is an adapter's folder too, it is merged.) With `dtype` None the model has the
    dtype of its files. With `reward`, a reward model: a sequence classifier with one label. A causal LM then
    gets a head of zeros in place of its own. Only safetensors weights are read. Raises InputError if model or
    tokenizer cannot be loaded completely.
    """
    base, adapters = find_base(str(path))
    folder = Path(base)
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"--model {base}: the run is unfinished; train with --resume to finish it")
    with loading(f"--model {path}"):
        # PEFT writes no tokenizer into an adapter's folder: then it is the base's
        own = any(Path(path).glob("tokenizer*"))
        tokenizer = AutoTokenizer.from_pretrained(str(path) if own else base, trust_remote_code=False)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise InputError(f"--model {base}: no *.safetensors weights there (other formats are not read)")
    with loading(f"--model {base}"):
        config = read_config(base)
    for part in (config, config.get_text_config()):
        if quantization := getattr(part, "quantization_config", None):
            kind = dict(quantization).get("quant_method", "bitsandbytes")  # whose older files do not name it
            reason = f"its weights are quantized ({kind}); give the unquantized model"
            raise InputError(f"--model {base}: {reason}")
    options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    options |= {"num_labels": 1} if reward else {}
    with loading(f"--model {base}"):
        model, info = auto.from_pretrained(base, dtype=dtype or "auto", **options)
    missing = set(info["missing_keys"])
    if "score.weight" in missing:  # not random: all processes must start from the same head
        missing.remove("score.weight")
        model.score.weight.data.zero_()
    broken = sorted(missing) + [str(name) for name in info["mismatched_keys"]]
    if broken:  # transformers would go on with random numbers
        raise InputError(f"--model {base}: {len(broken)} weights are missing or misshapen, first {broken[0]}")
    for adapter in adapters:  # merged on the CPU: the same weights on any device
        model = load_lora(merge_lora(model), adapter)
    if model.dtype == torch.float32:
        merge_lora(model)
    return model.to(device).eval(), tokenizer


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """save_pretrained, with the generation config as it was loaded.

    transformers refuses to write one that sets a temperature without do_sample, as Vicuna's and Llama 2's do.
    """
    generation = model.generation_config if model.can_generate() else None
    if generation:
        model.generation_config = type(generation)()
    model.save_pretrained(folder, **options)
    if generation:
        model.generation_config = generation
        generation.to_json_file(folder / "generation_config.json")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer into a folder: the files that it was loaded from.

    tokenizer.save_pretrained() loses fields (Llama's and Mistral's `legacy`), and the tokenizer that is
    loaded again then gives other ids. It is for tokenizers that were made here.
    """
    folder, source = Path(folder), tokenizer.name_or_path
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    paths = [cached_file(source, name, **quiet) for name in TOKENIZER_FILES] if source else []
    if not any(paths):
        tokenizer.save_pretrained(folder)
        return
    for path in filter(None, paths):
        shutil.copyfile(path, folder / Path(path).name)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    if tokenizer.pad_token != config.get("pad_token"):  # a reward model's, which load_reward_model() chose
        write_json(path, config | {"pad_token": tokenizer.pad_token})


def read_config(path: str, **options: Any) -> PreTrainedConfig:
    """A model's config.json. Raises ValueError if it has so many layers that they would fill the memory."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MAX_LAYERS:
        raise ValueError(f"its configuration has {layers:,} layers")
    return config


@contextlib.contextmanager
def loading(flag: str) -> Iterator[None]:
    """Turn whatever transformers raises for a bad folder or hub name into an InputError that names `flag`.

    Keep other code out of the block: its faults would be taken for the folder's.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise InputError(f"{flag}: cannot be loaded: {reason}") from error


def load_reward_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer, from a folder or the hub; a causal LM gets a head of zeros.

    Both know the same padding token. transformers reads the score at the last token that is not padding.
    Raises InputError if it cannot be loaded.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no warning of a new head
    model, tokenizer = load_model(path, device, dtype, reward=True)
    transformers_logging.set_verbosity(verbosity)
    config = model.config.get_text_config()
    if not hasattr(model, "score"):
        raise InputError(f"--model {path}: {type(model).__name__} has no head named score; give a decoder")
    model.score.forward = partial(float32_score, model.score)
    for pad in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if pad is not None and pad >= 0:  # -1 in some configs: none
            config.pad_token_id = tokenizer.pad_token_id = pad
            return model, tokenizer
    raise InputError(f"--model {path}: its tokenizer has neither a padding nor an end token")


def export(out: Path, config: Any, model: PreTrainedModel, tokenizer: Any, row: dict) -> None:
    """Write the adapter (or, at --lora_rank 0, the whole model), the tokenizer and a model card.

    All processes must call it: each sharded weight is gathered in turn, and rank 0 writes.
    """
    if config.lora_rank:
        base = Path(model.config.name_or_path)  # if --model is an adapter's folder, the model below it
        save_lora(model, out, base.resolve() if base.is_dir() else base)
    else:
        weights, gathered = {}, {}  # a tied weight stays one tensor under two names and is written once
        for name, weight in model.state_dict(keep_vars=True).items():
            if id(weight) not in gathered:
                tensor = full_tensor(weight.detach())
                gathered[id(weight)] = tensor.cpu() if get_rank() == 0 else None
            weights[name] = gathered[id(weight)]
        if get_rank() == 0:
            save_model(model, out / ".weights", state_dict=weights)
            for path in (out / ".weights").iterdir():
                os.replace(path, out / path.name)
            (out / ".weights").rmdir()
    if get_rank() > 0:
        return
    save_tokenizer(tokenizer, out)
    with atomic_write(out / "README.md") as file:
        file.write(model_card(out.name, config, row))
    print(f"wrote {out}")


def model_card(name: str, config: Any, row: dict[str, float]) -> str:
    """README.md of a finished run, with the metadata that the hub reads; `row` holds the final figures.

    It has the command, all flags and library versions. Its method is the first line of the script's
    docstring.
    """
    # the hub takes no folder for a base_model
    base = "" if Path(config.model).is_dir() else f"base_model: {json.dumps(config.model)}\n"
    method = (sys.modules["__main__"].__doc__ or "").strip().partition("\n")[0]
    figures = "\n".join(f"    {key} {value:.4g}" for key, value in row.items())
    flags = "\n".join(f"    --{key} {value}" for key, value in asdict(config).items())
    return f"""---
{base}library_name: {"peft" if config.lora_rank else "transformers"}
---
# {name}

{method}

- base model: `{config.model}`
- data: `{config.data}`
- command: `{shlex.join(["python", *sys.argv])}`
- processes: {get_world_size()}
- versions: torch {torch.__version__}, transformers {transformers.__version__}

At the end:

{figures}

All flags:

{flags}
"""
