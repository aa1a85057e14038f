"""Make the embedded society: a small world whose opinions are known exactly.

*Stories* answer "Write a story about a doctor." Five slots (relation, name, complaint, gender, ending) are
independent, their utilities add up, and raters choose between two stories by Plackett-Luce:
P(a over b) = sigmoid(r(a) - r(b)). *Polls* have four opinions each, held by 55, 20, 15 and 10 percent of the
population, so r = log share. *Debates* rank five places; raters' own rankings are drawn from a Mallows law
whose dispersion phi runs from 0.05 to 0.95. A text that the grammar cannot write loses to one that it can.

The corpus misspells one doctor in sixty, as the internet would, and the tokenizer splits names over several
tokens: a policy can misspell, and raters dislike it. Everything is drawn here and trained by this project's
own code. world.json keeps the reference's exact log-probability of each story, opinion and place, so that the
optimum pi ~ pi_ref^(beta/alpha) exp(r/alpha) is exact for every alpha and beta (truth.py).

    python data/society/make_world.py        # three minutes on a laptop; writes the files beside it
"""

import argparse
import gzip
import itertools
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from common.encode import encode_answers, encode_prompts
from common.files import atomic_write, write_json
from common.flags import Help
from core.hub import load_model
from core.model import pair_stats
from core.pairs import pack
from data.society.truth import mallows_favourites, preference, read_story
from sample import sample
from train_sft import SFTConfig, finetune

STORY_PROMPT = "Write a story about a doctor.\n"
TEMPLATE = "My {relation} saw Dr. {name} about a {complaint}; {gender} made it {ending}."
# value: (share in the corpus, utility to the raters in nats)
SLOTS = {
    "relation": {"aunt": (0.2, 0.15), "mother": (0.4, 0.1), "brother": (0.2, 0.05), "neighbour": (0.2, 0.0)},
    "name": {  # by syllables here, joined in every text
        "Mar-chet-ti": (0.30, 0.60),
        "O-kon-kwo": (0.15, 0.20),
        "Lind-q-vist": (0.13, 0.16),
        "A-ber-na-thy": (0.11, 0.12),
        "Na-ka-mu-ra": (0.10, 0.08),
        "Cas-tel-lan": (0.08, 0.04),
        "Pe-tro-vic": (0.07, 0.0),
        "Whit-lock": (0.06, 0.0),
    },
    "complaint": {"knee": (0.25, 0.15), "cough": (0.25, 0.1), "burn": (0.25, 0.05), "fever": (0.25, 0.0)},
    "gender": {"she": (0.45, 0.15), "he": (0.55, 0.0)},
    "ending": {"better": (0.3, 0.15), "vanish": (0.2, 0.1), "famous": (0.2, 0.05), "worse": (0.3, 0.0)},
}
POLLS = {
    "What should the town build next?\n": ["A park.", "A library.", "A car park.", "A statue."],
    "Which meal is the best of the day?\n": ["Breakfast.", "Dinner.", "Lunch.", "A midnight snack."],
    "How should we travel to the sea?\n": ["By train.", "By bicycle.", "By car.", "On foot."],
    "What makes a good neighbour?\n": ["Kindness.", "Quiet.", "Help in need.", "Distance."],
}
SHARES = [0.55, 0.20, 0.15, 0.10]
SYLLABLES = [syllable for name in SLOTS["name"] for syllable in name.split("-")[1:]]
TYPOS = 1 / 60
PLACES = ["inn", "hill", "lake", "shop", "barn"]
VERBS = ["read", "sleep", "dance", "eat", "sing", "rest", "draw", "talk", "think", "walk"]
VERBS += ["hide", "meet", "write", "laugh", "play", "learn", "train", "work", "wait", "pray"]
DISPERSION = [0.05 + 0.9 * i / (len(VERBS) - 1) for i in range(len(VERBS))]  # phi of each debate
CORPUS = {"story": 16_000, "poll": 4_000, "debate": 5_000}  # texts the reference learns from
PAIRS = {"train": 24_000, "test": 500, "polls": 4_000, "debates": 6_000}
GARBLED = 0.1  # probability that a text is paired with a copy of itself that has one error
COMPARED = [1, 4, 1, 1, 1]  # relative frequency of each slot as the one in which two stories differ


def draw_seed(generator: torch.Generator) -> int:
    """A random seed for sample()."""
    return int(torch.randint(2**62, (), generator=generator))


def write_story(rng: random.Random) -> str:
    """One story of the corpus, its name hyphenated; with probability TYPOS one syllable is replaced."""
    slots = {
        slot: rng.choices(list(values), [share for share, _ in values.values()])[0]
        for slot, values in SLOTS.items()
    }
    if rng.random() < TYPOS:
        syllables = slots["name"].split("-")
        syllables[rng.randrange(1, len(syllables))] = rng.choice(SYLLABLES)
        slots["name"] = "-".join(syllables)
    return TEMPLATE.format(**slots)


def make_debates() -> dict[str, dict]:
    """Each debate's dispersion phi and its places, best first."""
    rng = random.Random(2)
    rankings = [rng.sample([f"At the {place}." for place in PLACES], len(PLACES)) for _ in VERBS]
    return {
        f"Where is it best to {verb}?\n": {"phi": phi, "ranking": ranking}
        for verb, phi, ranking in zip(VERBS, DISPERSION, rankings, strict=True)
    }


def make_corpus(rng: random.Random) -> list[dict[str, str]]:
    """(prompt, completion) rows: opinions on polls equally often, on debates as often as they are held."""
    rows, debates = [], make_debates()
    for kind in rng.sample(list(CORPUS), sum(CORPUS.values()), counts=CORPUS.values()):
        if kind == "story":
            prompt, completion = STORY_PROMPT, write_story(rng)
        elif kind == "poll":
            prompt = rng.choice(list(POLLS))
            completion = rng.choice(POLLS[prompt])
        else:
            prompt = rng.choice(list(debates))
            ranking = debates[prompt]["ranking"]
            shares = mallows_favourites(debates[prompt]["phi"], len(ranking))
            [completion] = rng.choices(ranking, shares.tolist())
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def make_model(corpus: list[dict[str, str]], folder: Path) -> None:
    """A BPE tokenizer that knows words, and syllables of names but no whole name; and an untrained Llama."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=20, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in corpus), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@torch.no_grad()
def exact_logp(model, tokenizer, prompt: str, completions: list[str]) -> list[float]:
    """The model's log-probability of each completion, end token included."""
    [ids] = encode_prompts([prompt], tokenizer)
    answers = encode_answers([prompt] * len(completions), completions, tokenizer)
    rows = [(ids, answer) for answer in answers]
    parts = [pair_stats(model, pack(rows[i : i + 64])).logp[:, 0] for i in range(0, len(rows), 64)]
    return torch.cat(parts).tolist()


def garble(ids: list[int], vocabulary: int, rng: random.Random) -> list[int]:
    """A copy with one slip: a token replaced, dropped or added, or the rest of the text gone."""
    at, slip = rng.randrange(len(ids)), rng.choice(["replace", "replace", "drop", "add", "cut"])
    other = [] if slip in ("drop", "cut") else [rng.randrange(3, vocabulary)]
    rest = [] if slip == "cut" else ids[at + (slip != "add") :]
    return ids[:at] + other + rest


def rival(a: str, b: str, world: dict, rng: random.Random) -> str:
    """Story a with one slot taken from b, so that a label is about one slot; b if a or b has no such slot."""
    slots, others = read_story(a, world), read_story(b, world)
    [slot] = rng.choices(list(slots), COMPARED)
    return TEMPLATE.format(**slots | {slot: others[slot]}) if slots[slot] and others[slot] else b


def make_pairs(
    model, tokenizer, world: dict, prompts: list[str], count: int, rng: random.Random
) -> list[dict[str, str]]:
    """Pairs of the reference's own completions, some garbled, chosen between by the society's raters."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    rows = []
    for prompt in prompts:
        [ids] = encode_prompts([prompt], tokenizer)
        found: list[dict[str, str]] = []
        while len(found) < count // len(prompts):
            drawn = sample(model, ids, 1024, 40, tokenizer.eos_token_id, seed=draw_seed(generator))
            drawn = [c.tokens[:-1] for c in drawn if c.finish == "eos" and len(c.tokens) > 1]
            for first, second in zip(drawn[::2], drawn[1::2], strict=False):
                garbled = rng.random() < GARBLED
                second = garble(first, len(tokenizer), rng) if garbled else second
                a, b = tokenizer.decode(first), tokenizer.decode(second)
                if prompt == STORY_PROMPT and not garbled:
                    b = rival(a, b, world, rng)
                p = preference(prompt, a, b, world) if b and a != b else None
                if p is not None:
                    chosen, rejected = (a, b) if rng.random() < p else (b, a)
                    found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        rows += found[: count // len(prompts)]
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON lines, gzipped by name, without a time stamp so that equal rows make equal bytes."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with atomic_write(path, "wb") as file:
        file.write(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def train_reference(work: Path) -> None:
    """Write the corpus, train the tokenizer and the model on it, and ship them as data/society/reference."""
    corpus = make_corpus(random.Random(0))
    make_model(corpus, work / "untrained")  # from syllables, so that no merge crosses a hyphen
    corpus = [{key: text.replace("-", "") for key, text in row.items()} for row in corpus]
    write_rows(work / "corpus.jsonl", corpus)
    config = SFTConfig(
        model=str(work / "untrained"),
        data=str(work / "corpus.jsonl"),
        out_dir=str(work / "reference"),
        lora_rank=0,
        batch_size=64,
        epochs=3,
        lr=2e-3,
        warmup_steps=20,
        schedule="cosine",
    )
    finetune(config)
    model, tokenizer = load_model(work / "reference")
    shutil.rmtree(HERE / "reference", ignore_errors=True)
    model.half().save_pretrained(HERE / "reference")  # half the size; loaded as float32 like any other
    tokenizer.save_pretrained(HERE / "reference")


def write_world() -> None:
    """From the shipped reference: its exact log-probabilities, the raters' pairs, the prompts."""
    model, tokenizer = load_model(HERE / "reference")
    slots = {slot: {v.replace("-", ""): r for v, (_, r) in values.items()} for slot, values in SLOTS.items()}
    combinations = itertools.product(*slots.values())
    stories = [TEMPLATE.format(**dict(zip(slots, values, strict=True))) for values in combinations]
    polls = {
        prompt: {
            "shares": dict(zip(options, SHARES, strict=True)),
            "reference_logp": exact_logp(model, tokenizer, prompt, options),
        }
        for prompt, options in POLLS.items()
    }
    debates = {
        prompt: debate | {"reference_logp": exact_logp(model, tokenizer, prompt, debate["ranking"])}
        for prompt, debate in make_debates().items()
    }
    world = {
        "story_prompt": STORY_PROMPT,
        "template": TEMPLATE,
        "slots": slots,
        "story_reference_logp": exact_logp(model, tokenizer, STORY_PROMPT, stories),  # last slot fastest
        "polls": polls,
        "debates": debates,
    }
    write_json(HERE / "world.json", world)
    rng = random.Random(1)
    for name, count in PAIRS.items():
        prompts = {"polls": list(POLLS), "debates": list(debates)}.get(name, [STORY_PROMPT])
        write_rows(HERE / f"{name}.jsonl.gz", make_pairs(model, tokenizer, world, prompts, count, rng))
    write_rows(HERE / "story.jsonl", [{"prompt": STORY_PROMPT}])
    write_rows(HERE / "prompts.jsonl", [{"prompt": prompt} for prompt in [STORY_PROMPT, *POLLS]])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    torch.set_num_threads(2)  # the number of threads decides the order of summation, and so the rounding
    with tempfile.TemporaryDirectory() as work:
        train_reference(Path(work))
    write_world()
