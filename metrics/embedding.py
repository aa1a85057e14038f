"""Embeddings of texts by a sentence encoder, as the package sentence-transformers would compute them.

An encoder in that package's layout names in modules.json what follows the transformer:

    1_Pooling     makes one vector of a text's hidden states: that of the first token (BGE, arctic-embed), of
                  the last one (Qwen3-Embedding), or the mean (all-MiniLM, E5)
    2_Dense       a layer on that vector (LaBSE, sentence-t5)
    2_Normalize   scales it to length 1

Another model, such as a language model, is pooled by the mean. What cannot be applied is refused.

Some encoders also name prompts, such as "query: ". Samples are neither queries nor passages, so only a prompt
that the encoder puts before every text by default is used. If it has others, a line says that they are not.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.utils import cached_file

from common.files import InputError
from common.parallel import get_device
from core.checks import max_positions
from core.hub import loading, read_config
from core.pairs import micro_batches

# one vector per text from hidden states (texts, tokens, d) and a mask (texts, tokens), 1 where a token is
POOLINGS = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "mean": lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "max": lambda hidden, mask: hidden.masked_fill(mask[..., None] == 0, -math.inf).amax(1),
    "lasttoken": lambda hidden, mask: hidden[torch.arange(len(mask)), mask.sum(1) - 1],
}
ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x}


def read_json(encoder: str, folder: str, name: str) -> Any:
    """A JSON file in a folder of the encoder, {} if there is none."""
    path = cached_file(encoder, name, subfolder=folder, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_bytes()) if path else {}


def read_pooling(encoder: str, folder: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of POOLINGS that 1_Pooling/config.json names. Raises InputError for another one."""
    config = read_json(encoder, folder, "config.json")
    modes = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if not config.get("include_prompt", True):
        modes.append("tokens after a prompt")
    if len(modes) != 1 or modes[0] not in POOLINGS:
        what = f"pools by {' and '.join(modes) or 'nothing'}; supported is one of {', '.join(POOLINGS)}"
        raise InputError(f"--embedder {encoder}: {folder}/config.json: {what}")
    return POOLINGS[modes[0]]


def read_dense(encoder: str, folder: str) -> Callable[[Tensor], Tensor]:
    """The layer of 2_Dense. Raises InputError if it has no safetensors weights or is of another kind."""
    config = read_json(encoder, folder, "config.json")
    activation = ACTIVATIONS.get(config["activation_function"].rpartition(".")[2])
    is_plain = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if not activation or not is_plain or config.get("use_residual"):
        raise InputError(f"--embedder {encoder}: {folder}/config.json: this layer is not supported")
    name = "model.safetensors"
    path = cached_file(encoder, name, subfolder=folder, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise InputError(f"--embedder {encoder}: {folder} has no {name}; other weights are not read")
    weights = {name: tensor.to(get_device(), torch.float32) for name, tensor in load_file(path).items()}
    return lambda x: activation(F.linear(x, weights["linear.weight"], weights.get("linear.bias")))


def read_modules(encoder: str) -> tuple[str, Callable[[Tensor, Tensor], Tensor], list[Callable]]:
    """The transformer's folder in the encoder's, the pooling, and the layers after it.

    Raises InputError if modules.json names anything else, or in another order.
    """
    modules = read_json(encoder, "", "modules.json")
    if not modules:
        if not Path(encoder).is_dir() and try_to_load_from_cache(encoder, "modules.json") is None:  # offline
            raise InputError(f"--embedder {encoder}: no such folder, and no modules.json of it in the cache")
        return "", POOLINGS["mean"], []
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    folders = [module["path"] for module in modules]
    if kinds[-1] == "Normalize":  # changes no direction, and the metrics are of directions
        kinds.pop()
    unknown = [kind for i, kind in enumerate(kinds) if kind != ("Transformer", "Pooling", "Dense")[min(i, 2)]]
    if unknown or len(kinds) < 2 or not modules[0]["type"].startswith("sentence_transformers."):
        raise InputError(f"--embedder {encoder}: modules.json: {' - '.join(kinds)} is not supported")
    layers = [read_dense(encoder, folder) for folder in folders[2 : len(kinds)]]
    return folders[0], read_pooling(encoder, folders[1]), layers


def read_prompt(encoder: str) -> str:
    """The prompt that the encoder puts before every text by default, mostly ""."""
    config = read_json(encoder, "", "config_sentence_transformers.json")
    prompts = {name: prompt for name, prompt in (config.get("prompts") or {}).items() if prompt}
    default = config.get("default_prompt_name")
    if prompts and default not in prompts:
        names = ", ".join(prompts)
        print(f"{encoder}: its prompts ({names}) are for other tasks: texts have none", file=sys.stderr)
    return prompts.get(default, "")


@torch.no_grad()
def embed(texts: Sequence[str], encoder: str, max_tokens: int = 4096) -> np.ndarray:
    """Embeddings of texts, (texts, d), of any length: only their directions count.

    `encoder` is a folder or hub name. Texts of similar length are padded in batches of about `max_tokens`
    tokens. Texts that are too long for the encoder are truncated. Raises InputError if it cannot be loaded or
    applied.
    """
    with loading(f"--embedder {encoder}"):
        folder, pooling, layers = read_modules(encoder)
        prompt, settings = read_prompt(encoder), read_json(encoder, folder, "sentence_bert_config.json")
        tokenizer = AutoTokenizer.from_pretrained(encoder, subfolder=folder)
        config = read_config(encoder, subfolder=folder)
        # of T5, the encoder alone
        kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, info = kind.from_pretrained(encoder, subfolder=folder, **options)
        missing = [name for name in info["missing_keys"] if "pooler" not in name]  # which is not used here
        if missing:  # transformers would go on with random numbers
            raise ValueError(f"{len(missing)} weights are missing, first {min(missing)}")
        limits = [
            tokenizer.model_max_length,
            max_positions(model),
            settings.get("max_seq_length") or math.inf,
        ]
        prompted = [(prompt + text).strip() for text in texts]
        if settings.get("do_lower_case"):
            prompted = [text.lower() for text in prompted]
        ids = tokenizer(prompted, truncation=True, max_length=int(min(*limits, 10**9))).input_ids
    if model.config.is_encoder_decoder:
        raise InputError(f"--embedder {encoder}: {type(model).__name__} has a decoder; give an encoder")
    model = model.to(get_device()).eval()
    vectors = {}
    bar = tqdm(total=len(texts), desc="embeddings", unit="text", disable=None)
    for batch in micro_batches(range(len(texts)), [[row] for row in ids], max_tokens):
        rows = [torch.tensor(ids[i], device=model.device) for i in batch]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden = model(pad_sequence(rows, batch_first=True), attention_mask=mask).last_hidden_state
        pooled = pooling(hidden, mask)
        for layer in layers:
            pooled = layer(pooled)
        vectors |= zip(batch, pooled.cpu(), strict=True)
        bar.update(len(batch))
    bar.close()
    return torch.stack([vectors[i] for i in range(len(texts))]).numpy()
