"""embedding.py against transformers alone: one text at a time, not padded, pooled by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from common.files import InputError
from metrics.embedding import embed
from tiny import train_tokenizer

TEXTS = ["The fig.", " A grey cat is the best fruit.", "Zoë sings about a café!", "x"]
PLACE = "sentence_transformers.models."
SIZES = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_encoder(folder, model, *modules, **settings):
    """Save a model as an encoder; `modules` are (kind, config) of what follows it in modules.json."""
    tokenizer = train_tokenizer("bytes")
    tokenizer.pad_token = "<unk>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"path": "", "type": PLACE + "Transformer"}]
    for i, (kind, config) in enumerate(modules, 1):
        rows.append({"path": f"{i}_{kind}", "type": PLACE + kind})
        (folder / f"{i}_{kind}").mkdir()
        (folder / f"{i}_{kind}/config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(rows))
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def make_bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=128))


@torch.no_grad()
def states(folder, kind, text):
    """Last hidden states of one text, (tokens, d); sentence-transformers strips texts."""
    ids = AutoTokenizer.from_pretrained(folder)(text.strip(), return_tensors="pt").input_ids
    return kind.from_pretrained(folder).eval()(ids).last_hidden_state[0]


def pooling(mode):
    """1_Pooling/config.json, which has one key for each mode."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    return "Pooling", {f"pooling_mode_{name}": name == mode for name in names}


@pytest.mark.parametrize(
    ("config", "pool"),
    [
        (pooling("cls_token"), lambda x: x[0]),
        (pooling("mean_tokens"), lambda x: x.mean(0)),
        (pooling("max_tokens"), lambda x: x.max(0).values),
        (pooling("lasttoken"), lambda x: x[-1]),
        (("Pooling", {"embedding_dimension": 32, "pooling_mode": "lasttoken"}), lambda x: x[-1]),
        (("Pooling", {"pooling_mode": ["cls"], "include_prompt": True}), lambda x: x[0]),
    ],
)
@pytest.mark.parametrize("kind", [BertModel, LlamaModel])
def test_pooling_is_the_one_that_the_encoder_names(tmp_path, config, pool, kind):
    torch.manual_seed(0)
    model = make_bert() if kind is BertModel else LlamaModel(LlamaConfig(**SIZES, intermediate_size=64))
    folder = save_encoder(tmp_path / "encoder", model, config)
    right = torch.stack([pool(states(folder, kind, text)) for text in TEXTS])
    torch.testing.assert_close(torch.tensor(embed(TEXTS, str(folder))), right, atol=1e-5, rtol=1e-5)


def test_an_encoder_of_lower_case(tmp_path):
    settings = {"sentence_bert_config": {"do_lower_case": True}}
    folder = save_encoder(tmp_path / "encoder", make_bert(), pooling("mean_tokens"), **settings)
    upper, lower = (embed([f(text) for text in TEXTS], str(folder)) for f in (str.upper, str.lower))
    assert (upper == lower).all()
    wanted = torch.stack([states(folder, BertModel, text.lower()).mean(0) for text in TEXTS])
    torch.testing.assert_close(torch.tensor(lower), wanted, atol=1e-5, rtol=1e-5)


def test_dense_layers_are_applied_and_normalisation_changes_no_direction(tmp_path):
    layers = [torch.nn.Linear(32, 16), torch.nn.Linear(16, 8, bias=False)]
    names = ("activation.Tanh", "linear.Identity")
    modules = [("Dense", {"activation_function": f"torch.nn.modules.{name}"}) for name in names]
    modules = [pooling("cls_token"), *modules, ("Normalize", {})]
    folder = save_encoder(tmp_path / "encoder", make_bert(), *modules)
    for i, layer in enumerate(layers, 2):
        layer.half().float()  # files may hold either, here one of each
        weights = {f"linear.{name}": value.detach() for name, value in layer.named_parameters()}
        weights = {name: value.half() if i == 2 else value for name, value in weights.items()}
        save_file(weights, folder / f"{i}_Dense/model.safetensors")
    with torch.no_grad():
        right = torch.stack([layers[1](layers[0](states(folder, BertModel, t)[0]).tanh()) for t in TEXTS])
    made = torch.tensor(embed(TEXTS, str(folder)))
    torch.testing.assert_close(torch.cosine_similarity(made, right), torch.ones(len(TEXTS)))


@pytest.mark.parametrize("kind", [T5Model, T5EncoderModel])
def test_of_t5_the_encoder_is_used(tmp_path, kind):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 500}
    torch.manual_seed(0)
    model = kind(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    folder = save_encoder(tmp_path / "encoder", model, pooling("mean_tokens"))
    right = torch.stack([states(folder, T5EncoderModel, text).mean(0) for text in TEXTS])
    torch.testing.assert_close(torch.tensor(embed(TEXTS, str(folder))), right, atol=1e-5, rtol=1e-5)


def test_only_a_default_prompt_is_used(tmp_path, capsys):
    prompts = {"query": "My friend ", "document": ""}
    for default, start in (("query", "My friend "), (None, "")):
        config = {"prompts": prompts, "default_prompt_name": default}
        folder = tmp_path / f"encoder{default}"
        save_encoder(folder, make_bert(), pooling("mean_tokens"), config_sentence_transformers=config)
        right = torch.stack([states(folder, BertModel, start + text).mean(0) for text in TEXTS])
        torch.testing.assert_close(torch.tensor(embed(TEXTS, str(folder))), right, atol=1e-5, rtol=1e-5)
        assert ("its prompts (query)" in capsys.readouterr().err) == (default is None)


def test_a_long_text_is_embedded_by_its_start(tiny_model_folder, tmp_path):
    """The tiny model has 2,048 positions, the other encoder's configuration allows 20 tokens."""
    short = save_encoder(
        tmp_path / "encoder",
        make_bert(),
        pooling("mean_tokens"),
        sentence_bert_config={"max_seq_length": 20},
    )
    for folder, limit in ((tiny_model_folder, 2048), (short, 20)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "fig.mud." * 2000  # no space: one at the end would be stripped
        start = tokenizer.decode(tokenizer(text).input_ids[:limit])
        both = embed([text, start], str(folder))
        assert both[0] == pytest.approx(both[1], abs=1e-5)


NORMALIZE, TANH = ("Normalize", {}), {"activation_function": "torch.nn.modules.activation.Tanh"}
MEAN = pooling("mean_tokens")


@pytest.mark.parametrize(
    ("modules", "fragment"),
    [
        ([pooling("mean_sqrt_len_tokens")], "1_Pooling/config.json: pools by mean_sqrt_len; supported"),
        ([pooling("")], "pools by nothing"),
        ([("Pooling", {"pooling_mode": ["cls", "mean"]})], "pools by cls and mean"),
        ([("Pooling", {"pooling_mode": "mean", "include_prompt": False})], "tokens after a prompt"),
        ([NORMALIZE], "Transformer is not supported"),
        ([MEAN, ("LSTM", {})], "Transformer - Pooling - LSTM is not supported"),
        ([MEAN, NORMALIZE, ("Dense", TANH)], "Pooling - Normalize - Dense is not supported"),
        ([MEAN, ("Dense", TANH)], "2_Dense has no model.safetensors"),
        ([MEAN, ("Dense", {"activation_function": "torch.nn.GELU"})], "2_Dense/config.json"),
        ([MEAN, ("Dense", TANH | {"use_residual": True})], "2_Dense/config.json"),
    ],
)
def test_what_cannot_be_applied_is_refused(tmp_path, modules, fragment):
    folder = save_encoder(tmp_path / "encoder", make_bert(), *modules)
    with pytest.raises(InputError, match="--embedder") as error:
        embed(TEXTS, str(folder))
    assert fragment in str(error.value)


def test_a_decoder_and_an_unknown_pooling_are_refused(tmp_path):
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    model = BartModel(BartConfig(vocab_size=500, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes))
    folder = save_encoder(tmp_path / "encoder", model, MEAN)
    with pytest.raises(InputError, match="BartModel has a decoder"):
        embed(TEXTS, str(folder))
    with pytest.raises(InputError, match=r"no modules\.json of it in the cache"):
        embed(TEXTS, "someone/encoder-that-was-never-loaded")
