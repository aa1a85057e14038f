"""Rows of test_refused.py: data, flags and output folders of training."""

import gzip

from tiny import FIG, MUD, PAIR, PAIRS, USER, lines

ROWS = {}

# ---- rows of data

BOTH = "must both be strings, or both message lists"
DATA = {
    "empty": (b"", "rows.jsonl: the file is empty"),
    "blank": (b"\n \n", "rows.jsonl: the file is empty"),
    "not UTF-8": (lines(PAIR) + b'{"prompt": "caf\xe9"}\n', "rows.jsonl:2: not UTF-8"),
    "not JSON": (lines(PAIR) + b"\n{'prompt': 1}\n", "rows.jsonl:3: not JSON"),
    "cut short": (lines(PAIR, PAIR)[:-9], "rows.jsonl:2: not JSON"),
    "nested too deep": (lines(PAIR) + b"[" * 200_000, "rows.jsonl:2: not JSON: nested too deeply"),
    "endless number": (b'{"prompt": ' + b"1" * 5000 + b"}", "rows.jsonl:1: not JSON"),
    "not an object": (lines(PAIR, ["a"]), "rows.jsonl:2: expected a JSON object, found list"),
    "key missing": (lines(PAIR, {"prompt": "a", "chosen": "b"}), "rows.jsonl:2: no key 'rejected'"),
    "no key at all": (lines({}), "rows.jsonl:1: no key 'chosen' (found none)"),
    "prompt is a number": (lines({**PAIR, "prompt": 3}), "rows.jsonl:1: 'prompt' must be a string"),
    "null completion": (lines({**PAIR, "chosen": None}), "rows.jsonl:1: ", BOTH),
    "mixed types": (lines({**PAIR, "chosen": [FIG]}), "rows.jsonl:1: ", BOTH),
    "empty completion": (
        lines(PAIR, {**PAIR, "rejected": ""}),
        "rows.jsonl:2: empty completion in 'rejected'",
    ),
    "half a surrogate": (lines(PAIR, {**PAIR, "chosen": "\ud83d"}), "rows.jsonl:2: not UTF-8"),
    "no Human and Assistant": (lines({"chosen": "a", "rejected": "b"}), "rows.jsonl:1: no 'prompt'"),
    "different questions": (
        lines({"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: c"}),
        "rows.jsonl:1: no 'prompt', and no shared prompt",
    ),
    "no shared message": (lines({"chosen": [FIG], "rejected": [MUD]}), "rows.jsonl:1: ", "no shared prompt"),
    "no message": (lines({"chosen": [], "rejected": []}), "rows.jsonl:1: ", "no shared prompt"),
    "no message in any": (lines({"prompt": [], "chosen": [], "rejected": []}), "rows.jsonl:1: ", "roles"),
    "roles out of order": (
        lines({"prompt": [USER, USER], "chosen": [FIG], "rejected": [MUD]}),
        "rows.jsonl:1: 'chosen': roles out of order: user, user, assistant",
    ),
    "a string prompt that the conversations do not have": (
        lines({"prompt": "Be a pirate.", "chosen": [USER, FIG], "rejected": [USER, MUD]}),
        "rows.jsonl:1: 'prompt' is in no message that 'chosen' and 'rejected' share",
    ),
    "an answer after an answer": (
        lines({"prompt": [USER, FIG], "chosen": "x", "rejected": "y"}),
        "rows.jsonl:1: a prompt must end with a message of the user",
    ),
    "user has the last word": (
        lines({"prompt": [USER, FIG], "chosen": [USER], "rejected": [USER]}),
        "rows.jsonl:1: 'chosen' must be one assistant message",
    ),
    "message without content": (
        lines({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [MUD]}),
        "rows.jsonl:1: 'chosen': a message needs a string 'role' and a string 'content'",
    ),
    "empty message": (
        lines({"prompt": [USER], "chosen": [FIG], "rejected": [{**MUD, "content": ""}]}),
        "rows.jsonl:1: empty completion in 'rejected'",
    ),
    "equal completions": (
        lines(*[{**PAIR, "chosen": " Mud."}] * 2),
        "rows.jsonl: no pair left of 2: dropped 2 with chosen equal to rejected",
    ),
}
for name, (text, *fragments) in DATA.items():
    ROWS[f"data: {name}"] = ("train_dpl", "--data rows.jsonl", {"rows.jsonl": text}, *fragments)

NEEDS = "needs 'prompt' and a non-empty 'completion'"
SUPERVISED = [
    ({"prompt": "a", "completion": ""}, NEEDS),
    ({"prompt": "a", "completion": [FIG]}, NEEDS),
    ({"messages": []}, NEEDS),
    ({"messages": [USER]}, "must be one assistant message"),
    ({"messages": [FIG]}, "roles out of order: assistant"),
    ({"prompt": [], "completion": []}, "roles out of order"),
    ({"prompt": [USER, FIG], "completion": "x"}, "a prompt must end with a message of the user"),
    ({"messages": ["Hi"]}, "a message needs a string 'role'"),
]
for number, (row, fragment) in enumerate(SUPERVISED):
    text = lines({"prompt": "a", "completion": "b"}, row)
    ROWS[f"sft {number}"] = (
        "train_sft",
        "--data rows.jsonl",
        {"rows.jsonl": text},
        "rows.jsonl:2: ",
        fragment,
    )

FILES = {
    "missing.jsonl": (None, "missing.jsonl: no such file"),
    "rows.doc": (b"a,b\n", "rows.doc: unknown format"),
    "cut.jsonl.gz": (
        gzip.compress(lines(*PAIRS))[:-9],
        "cut.jsonl.gz: damaged or cut-short gzip file, after",
    ),
    "plain.jsonl.gz": (lines(PAIR), "plain.jsonl.gz: damaged or cut-short gzip file, after row 0"),
    "object.json": (b'{"data": []}', "object.json: expected a JSON list of objects, found dict"),
    "half.json": (b'[{"prompt":\n', "half.json:2: not JSON"),
    "deep.json": (b"[" * 200_000, "deep.json:1: not JSON: nested too deeply"),
    "none.json": (b"[]", "none.json: the file is empty"),
    "rows.parquet": (b"PAR1 not really", "rows.parquet: not a readable parquet file"),
    "empty.csv": (b"", "empty.csv: the file is empty"),
    "header.csv": (b"a,b\n", "header.csv: the file is empty"),
    "latin.csv": ("a,b\n1,2\n1,é\n".encode("latin-1"), "latin.csv:2: not UTF-8"),
    "open.csv": (b'a,b\n1,"2\n', "open.csv", "not readable as csv"),
    "quoted.csv": (b'a,b\n1,"2"3\n', "quoted.csv", "not readable as csv"),
    "more.csv": (b"a,b\n1,2\n1,2, and 3\n", "more.csv:2: more fields than the first line has names"),
    "long.csv": (b"a,b\n1," + b"2" * 200_000, "long.csv", "not readable as csv"),
}
for name, (text, *fragments) in FILES.items():
    for flag in ("data", "eval_data"):
        ROWS[f"--{flag} {name}"] = (
            "train_dpl",
            f"--{flag} {name}",
            {name: text} if text is not None else {},
            *fragments,
        )

# ---- flags

FLAGS = {
    "--alpha 0": "error: --alpha 0.0: must be a positive number",
    "--alpha -0.1": "error: --alpha -0.1: must be a positive number",
    "--alpha nan": "error: --alpha nan: must be a positive number",
    "--beta 0": "error: --beta 0.0: must be a positive number",
    "--beta -1": "error: --beta -1.0: must be a positive number",
    "--beta nan": "error: --beta nan: must be a positive number",
    "--beta inf": "error: --beta inf: must be a positive number",
    "--lr abc": "argument --lr: invalid float value: 'abc'",
    "--batch_size two": "argument --batch_size/--batch-size: invalid int value: 'two'",
    "--batch_size": "argument --batch_size/--batch-size: expected one argument",
    "--overwrite perhaps": "argument --overwrite: ",
    "--learning_rate 1": "unknown argument --learning_rate",
    "--aplha 0.3": "unknown argument --aplha; did you mean --alpha?",
    "--alph 0.3": "unknown argument --alph",  # no guessing at abbreviations
    "--batchsize=8": "unknown argument --batchsize=8; did you mean --batch_size?",
    "stray": "unknown argument stray",
    "--max_length 3": "--max_length 3 is too small",
    f"--seed {2**70}": f"--seed {2**70}: must be",
    "--max_length 0": "--max_length 0: must be at least 1",
    "--schedule steep": "--schedule steep: must be one of constant, linear, cosine",
    "--overwrite --resume": "--resume True: must be given without --overwrite",
    "--lora_targets q_proj nope": "nope: no linear layer to adapt (--lora_targets); this model has ",
    "--lora_targets nope": "this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    "@missing.txt": "missing.txt",
    "--data ''": "--data: is empty; give a value, or leave the flag out",
    "--eval_data ''": "--eval_data: is empty; give a value, or leave the flag out",
    "--lora_targets q_proj ''": "--lora_targets: is empty; give a value",
    "--model nowhere": "--model nowhere: ",
}
ROWS |= {f"train_dpl {flags}": ("train_dpl", flags, {}, fragment) for flags, fragment in FLAGS.items()}
MALLOWS = ["--alpha 0", "--beta nan", "--gamma -1", "--loss dpo", "--link probit --loss phi", "--lr 0"]
MALLOWS += [
    "--link polynomial --loss theta",
    *(f"--epsilon {x} --link polynomial --loss phi" for x in ("wide", "0", "nan")),
]
MALLOWS += ["--alpha 0.4", "--gamma 1", "--epsilon auto --loss phi", "--dispersion_scale 2 --dispersion off"]
MALLOWS += ["--dispersion no", "--dispersion_scale 0", "--dispersion_scale inf"]
DIVERGENCES = ["--divergence kl", "--divergence_alpha 0", "--divergence_alpha 1"]
for script, some in (("train_mallows", MALLOWS), ("experiments.divergences", DIVERGENCES)):
    ROWS |= {f"{script} {flags}": (script, flags, {}, f"error: {flags.split()[0]} ") for flags in some}
ROWS |= {
    "train_reward --center": ("train_reward", "--center -1", {}, "--center -1"),
    "train_rl --max_length": (
        "train_rl",
        "--max_length 64",
        {},
        "--max_length 64: must be left out: prompts are not cut",
    ),
    "train_rl without a reward": ("train_rl", "", {}, "--reward_model None: must be given"),
    "data without a model": ("train_dpl --data pairs.jsonl", "--out_dir out/run", {}, "--model: is missing"),
    "a model without data": ("train_dpl --model model", "--out_dir out/run", {}, "--data: is missing"),
}
AT_FILES = {  # files of flags
    "an unbalanced quote": ("--data it's.jsonl\n", "it's.jsonl", "No closing quotation"),
    "an unknown flag": ("--lr 2\n--sise 3\n", "unknown argument --sise"),
    "its own name": ("--alpha 0.3\n@flags.txt\n", "an @file names itself"),
    "a NUL": ("--eval_data a\0b\n", "--eval_data: has a NUL character"),
    "Latin 1": (b"--alpha\n0.2\n# caf\xe9\n", "an @file is not UTF-8 text"),
}
for name, (text, *fragments) in AT_FILES.items():
    ROWS[f"flags.txt with {name}"] = ("train_dpl", "@flags.txt", {"flags.txt": text}, *fragments)
two = {"flags.txt": "--alpha 0.3\n@two.txt\n", "two.txt": "@flags.txt\n"}
ROWS["files of flags in a circle"] = ("train_dpl", "@flags.txt", two, "an @file names itself")

# ---- the output folder, and a run to resume

THESIS = {"out/run/thesis.tex": "years of work"}
HOLDS = "holds a run; --resume continues it, --overwrite replaces it"
OTHER = "holds files that are no run; name another folder"
ROWS |= {
    "a run": ("train_dpl", "--out_dir run", {}, f"--out_dir run: {HOLDS}"),
    "other files": ("train_dpl", "", THESIS, OTHER),
    "other files, --overwrite": ("train_dpl", "--overwrite", THESIS, OTHER),
    "other files, --resume": ("train_dpl", "--resume", THESIS, OTHER),
    "a file": ("train_dpl", "--out_dir pairs.jsonl --overwrite", {}, "--out_dir pairs.jsonl: is a file"),
    "below a file": ("train_dpl", "--out_dir pairs.jsonl/run", {}, "pairs.jsonl"),
    "the model of a run to overwrite": (
        "train_dpl, train_reward", "--model run --out_dir run --overwrite", {},
        "--model run: --overwrite would remove ",
    ),
    "the base of the adapter of a run to overwrite": (
        "train_dpl", "--model run --out_dir model --overwrite",
        {"model/run.json": "{}", "run/adapter_config.json": {"base_model_name_or_path": "model"}},
        "--model run: --overwrite would remove ",
    ),
    "data in a run to overwrite": (
        "train_dpl, train_reward", "--data run/samples.jsonl --out_dir run --overwrite",
        {"run/samples.jsonl": lines(*PAIRS)}, "--data run/samples.jsonl: --overwrite would remove ",
    ),
    "bad data for a run to overwrite": (
        "train_dpl", "--out_dir run --data missing.jsonl --overwrite", {}, "missing.jsonl: no such file",
    ),
}  # fmt: skip
RESUME = {
    "--alpha 0.3": "--alpha 0.3: the run to --resume had 0.2",
    "--lora_rank 4": "--lora_rank 4: the run to --resume had 2",
    "--max_steps 1": "--max_steps, --epochs: 1 steps, but the run to --resume is at 2",
    "--data pairs.jsonl": "--data pairs.jsonl: not that of the run to --resume",
}
fewer = {"pairs.jsonl": lines(*PAIRS[:2])}
for flags, fragment in RESUME.items():
    ROWS[f"--resume {flags}"] = ("train_dpl --resume", f"--out_dir run {flags}", fewer, fragment)
ROWS["--resume of another script's run"] = (
    "train_mallows --resume, train_sft --resume", "--out_dir run", {},
    "--out_dir run: was begun with DPLConfig, not ", "Config: --resume it with that script",
)  # fmt: skip
RUNS = {
    "cut short": ("{", "run/run.json: damaged"),
    "nested too deep": ("[" * 100_000, "run.json: damaged; --overwrite starts the run anew"),
    "closed, but nested too deep": ('{"model": ' + "[" * 500 + "]" * 500 + "}", "run.json: damaged"),
    "a list": ("[]", "run.json: damaged"),
    "pairs": ('[["seed", 0]]', "run.json: damaged"),
    "half a surrogate": ('{"model": "\\ud800"}', "run.json: damaged"),
    "empty data": ('{"data": ""}', "--data: is empty"),
    "a NUL in the data": ('{"data": "a\\u0000b"}', "--data: has a NUL character"),
    "a list of data": ('{"data": []}', "--data: expected one argument"),
}
for name, (text, fragment) in RUNS.items():
    ROWS[f"run.json {name}"] = ("train_dpl --resume", "--out_dir run", {"run/run.json": text}, fragment)
