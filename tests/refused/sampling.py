"""Rows of test_refused.py: prompts and flags of sample.py, and data/make_pairs.py and data/prepare.py."""

import math

from tiny import FIG, PAIR, USER, lines

DEEP = "[" * 100_000
OLD = {"out/x.jsonl": "old\n"}
UNFINISHED = "--model unfinished: the run is unfinished; train with --resume to finish it"
EXISTS = "exists; --overwrite replaces it"
NEEDS = "needs a 'prompt', a string or a message list"
ROWS = {
    "an existing file": ("sample", "--out_file pairs.jsonl", {}, f"--out_file pairs.jsonl: {EXISTS}"),
    "a folder": ("sample", "--out_file model --overwrite", {}, "model"),
    "no prompts": ("sample", "--prompts missing.jsonl", {}, "missing.jsonl: no such file"),
    "no prompt": ("sample", "", {"pairs.jsonl": lines(PAIR, {"text": "a"})}, f"pairs.jsonl:2: {NEEDS}"),
    "an empty prompt": ("sample", "", {"pairs.jsonl": lines({"prompt": []})}, f"pairs.jsonl:1: {NEEDS}"),
    "an answer alone": (
        "sample", "", {"pairs.jsonl": lines({"prompt": [FIG]})},
        "pairs.jsonl:1: roles out of order: assistant",
    ),
    "an answer last": (
        "sample", "", {"pairs.jsonl": lines({"prompt": [USER, FIG]})},
        "pairs.jsonl:1: a prompt must end with a message of the user",
    ),
    "a transcript's answer last": (
        "sample", "--chat", {"pairs.jsonl": lines({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello"})},
        "pairs.jsonl:1: a prompt must end with a message of the user",
    ),
    "an empty text": ("sample", "--prompts a.txt", {"a.txt": "\n \n"}, "a.txt: the file is empty"),
    "a Latin 1 text": ("sample", "--prompts a.txt", {"a.txt": b"caf\xe9\n"}, "a.txt:1: not UTF-8 text"),
    "an unfinished run": ("sample", "--model unfinished", {"unfinished/run.json": "{}"}, UNFINISHED),
}  # fmt: skip
FLAGS = {
    "--num_samples 0": "--num_samples 0: must be at least 1",
    "--prompt \udcff": "the command line or an @file is not UTF-8 text",
    "--temperature 1e-30": "--temperature 1e-30: must be 0, or at least 1e-6",
    "--temperature -1": "--temperature -1.0: must be 0, or at least 1e-6",
    "--top_p 0": "--top_p 0.0: must be in (0, 1]",
    "--batch_size 0": "--batch_size 0: must be at least 1",
    "--prompts ''": "--prompts: is empty; give a value, or leave the flag out",
    "--stop a ''": "--stop: is empty; give a value, or leave the flag out",
    "--resume --overwrite": "--resume True: must be given without --overwrite",
    "--global_temperature 0": "--global_temperature 0.0: must be at least 1e-06",
    "--global_temperature 2 --temperature 2": "must be given without --temperature",
    "--global_temperature 2 --particles 0": "--particles 0: must be at least --num_samples",
    "--max_new_tokens 2100": "--max_new_tokens 2100: needs 21",
    "--prompts missing.txt": "missing.txt: no such file",
    "--chat": "tokenizer has no chat template",
    "--prompt_template mmlu.jsonl --prompt Who?": "--prompt_template",
}
for number, (flags, fragment) in enumerate(FLAGS.items()):
    ROWS[f"sample {number}, {fragment}"] = ("sample", flags, {}, fragment)
DAMAGED = "out/x.jsonl.flags.json: missing or damaged"
ROWS["no flags to resume"] = ("sample", "--resume", OLD, DAMAGED)
for text in ("[]", DEEP):
    files = OLD | {"out/x.jsonl.flags.json": text}
    ROWS[f"flags to resume, {text[:2]}"] = ("sample", "--resume", files, DAMAGED)

# ---- templates

PROBLEM, EGGS = {"problem": "What is 1 + 1?"}, {"question": "How many eggs?"}
MISSING, QUESTION = (
    "template.txt: the placeholder {question} is missing",
    "pairs.jsonl:2: needs a 'question' or a 'problem'",
)
TEMPLATES = [
    ("{problem}", EGGS, MISSING),
    ("", EGGS, MISSING),
    (b"\xff {question}", EGGS, "template.txt: not UTF-8 text"),
    ("{question}", {"prompt": "Who?"}, QUESTION),
    ("{question}", {"question": 5}, QUESTION),
    ("{question}", {"problem": " \n"}, QUESTION),
]
for number, (template, row, fragment) in enumerate(TEMPLATES):
    files = {"template.txt": template, "pairs.jsonl": lines(PROBLEM, row)}
    ROWS[f"template {number}, {fragment}"] = ("sample", "--prompt_template template.txt", files, fragment)
ROWS["no template"] = ("sample", "--prompt_template none.txt", {}, "none.txt: no such file")

# ---- data/make_pairs.py


def rewarded(*rewards, **row):
    rows = ({"prompt": "a", "completion": "x", "reward": reward} for reward in rewards)
    return {"samples.jsonl": lines(*rows)}


FINITE = "samples.jsonl:1: needs a finite number 'reward'"
HOW = "--how best: must be one of best_worst, bradley_terry"
ROWS |= {
    "a reward of null": ("data.make_pairs", "", rewarded(None), FINITE),
    "a reward of NaN": ("data.make_pairs", "", rewarded(math.nan), FINITE),
    "one text": ("data.make_pairs", "", rewarded(1, 2), "no prompt has two different samples"),
    "--how best": ("data.make_pairs", "--how best", rewarded(1), HOW),
    "--pairs 0": ("data.make_pairs", "--pairs 0", rewarded(1), "--pairs 0: must be at least 1"),
}

# ---- data/prepare.py

PUBLISHED = {"test.jsonl": lines({"problem": "1?", "solution": "1", "level": 1}, {"question": "2?"})}
MATH = "math --out_file x.jsonl"
ROWS |= {
    "prepare gsm9k": ("data.prepare", "gsm9k", {}, "no such data set", "gsm8k"),
    "prepare into nothing": ("data.prepare", "math", {}, "--out_file", ".jsonl"),
    "prepare into parquet": (
        "data.prepare", "math --out_file x.parquet", {}, "--out_file x.parquet", ".jsonl",
    ),
    "prepare --split": ("data.prepare", f"{MATH} --split train", {}, "--split train", "math has test"),
    "prepare of nothing": (
        "data.prepare", f"{MATH} --from_dir .", {}, "no such file", "hf download", "test.jsonl",
    ),
    "prepare over a file": (
        "data.prepare", f"{MATH} --from_dir .", PUBLISHED | {"x.jsonl": "old"}, "x.jsonl", "--overwrite",
    ),
    "prepare of another layout": (
        "data.prepare", f"{MATH} --from_dir . --overwrite", PUBLISHED | {"x.jsonl": "old"},
        "test.jsonl:2", "not in the layout of", "problem",
    ),
}  # fmt: skip
