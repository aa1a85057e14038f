"""Rows of test_refused.py: evaluate.py's files and flags."""

from tiny import FIG, USER, lines

PROMPTS = ("Best fruit?", "A café?", "My friend likes")
TEXTS = (" The fig.", " A grey cat is the best fruit.", " Every baker sings about a café!", " Mud.")
MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "arithmetic"}
TRUTHFUL = {
    "Question": "What do figs do?",
    "Best Answer": "Nothing",
    "Incorrect Answers": "They sing; They bake",
}
EGGS = {"question": "Ann has 2 eggs and lays 3. How many?", "answer": "2 + 3 = 5\n#### 5"}
CATS = {"question": "Bo has 1,000 cats and sells 400. How many?", "answer": "He keeps 600.\n#### 600"}
ROOTS = {"problem": "Solve $x^2=4$.", "solution": "So $x=\\boxed{2}$.", "level": "Level 5"}
ANSWERED = [{"prompt": problem["question"], "completion": "5"} for problem in (EGGS, CATS)]
FILES = {  # in the folder in which the rows run
    "samples.jsonl": [{"prompt": prompt, "completion": text} for prompt in PROMPTS for text in TEXTS],
    "baseline.jsonl": [{"prompt": prompt, "completion": text} for prompt in PROMPTS for text in TEXTS[::-1]],
    "single.jsonl": [{"prompt": prompt, "completion": TEXTS[0]} for prompt in PROMPTS],
    "stranger.jsonl": [{"prompt": "Who?", "completion": "I."}],
    "mmlu.jsonl": [MMLU],
    "problems.jsonl": [EGGS, CATS],
    "dpo.jsonl": ANSWERED,
    "dpl.jsonl": ANSWERED,
    "eggs.jsonl": ANSWERED[:1],
    "cats.jsonl": ANSWERED[1:],
}
OLD = {"old.png": b"\x89PNG"}
NOBODY = "--endpoint http://127.0.0.1:9/v1 --retries 0"
ROWS = {}

# ---- samples

READERS = "evaluate diversity, evaluate quality --reward_model reward, evaluate judge"
READERS += ", evaluate winrate --baseline baseline.jsonl --reward_model reward, evaluate society"
GOOD_ROW, DEEP = {"prompt": "a", "completion": "b"}, "[" * 500 + "]" * 500
SAMPLES = {
    "picture": (b"\x89PNG\r\n\x1a\n\x00", "rows.jsonl:1", "not UTF-8"),
    "pairs": (
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "rows.jsonl:1: needs string 'prompt' and 'completion'",
    ),
    "empty file": (b"", "rows.jsonl: the file is empty"),
}
ROWS["samples: no file"] = (READERS, "--samples none.jsonl", {}, "none.jsonl: no such file")
for name, (text, *fragments) in SAMPLES.items():
    ROWS[f"samples: {name}"] = (READERS, "--samples rows.jsonl", {"rows.jsonl": text}, *fragments)
blank = lines(*FILES["samples.jsonl"], {"prompt": "B", "completion": " \n"})
ROWS["samples: empty text"] = (  # for society it is a malformed story
    READERS.removesuffix(", evaluate society"), "--samples rows.jsonl", {"rows.jsonl": blank},
    "rows.jsonl:13", "the text is empty",
)  # fmt: skip
MESSAGES = {
    "message without a role": lines({"messages": [{"content": "a"}, FIG]}),
    "message without content": lines({"messages": [{"role": "system"}, USER, FIG]}),
    "string among the messages": lines({"messages": ["a", USER, FIG]}),
    "content in parts": lines({"messages": [{**USER, "content": [{"type": "text", "text": "a"}]}, FIG]}),
    "no prompt": lines({"messages": [FIG]}),
    "nested too deep": f'{{"prompt": [{{"role": "user", "content": "a", "x": {DEEP}}}]}}\n'.encode(),
}
for name, text in MESSAGES.items():
    scripts, files = (
        "evaluate diversity, evaluate judge --dry_run, evaluate society",
        {"rows.jsonl": lines(GOOD_ROW) + text},
    )
    ROWS[f"samples: {name}"] = (scripts, "--samples rows.jsonl", files, "rows.jsonl:2: ")
FEW = "single.jsonl: diversity needs two samples of a prompt; see sample.py"
ROWS["one sample of a prompt"] = ("evaluate diversity", "--samples single.jsonl", {}, FEW)

# ---- flags

FLAGS = {
    "praise": "no such subcommand",
    "quality --samples samples.jsonl": "--reward_model",
    "winrate --samples samples.jsonl": "--baseline",
    "diversity --samples samples.jsonl --embeddings_url http://127.0.0.1:9/v1": "--embedder",
    "diversity --samples samples.jsonl --embeddings_url http://127.0.0.1:9/v1 --embedder m": "127.0.0.1:9",
    "judge --samples samples.jsonl --endpoint http://me:secret@host/v1": "--endpoint ...@host/v1: must be",
    "diversity --samples samples.jsonl --embeddings_url http://me:secret@host --embedder m": "...@host: ",
    "diversity --samples samples.jsonl --reward_model x": "--reward_threshold",
    "diversity --samples samples.jsonl --embedder nowhere": "--embedder",
    "diversity --samples samples.jsonl --budget 1": "--budget 1",
    "diversity --samples samples.jsonl --baseline stranger.jsonl": "no prompt in common",
    "quality --samples samples.jsonl --reward_model nowhere": "--reward_model",
    "quality --samples samples.jsonl --reward_model model": "without a reward head",
    "quality --samples samples.jsonl --reference nowhere": "--reference",
    "quality --samples samples.jsonl --reference model --out_file samples.jsonl": "--overwrite",
    f"judge --samples stranger.jsonl {NOBODY}": "1 samples",
    "society --samples samples.jsonl --alpha -1": "--alpha",
    "society --samples samples.jsonl --alpha nan": "--alpha",
    "society --samples samples.jsonl --alpha abc": "argument --alpha: invalid float value: 'abc'",
    "society --samples samples.jsonl --aplha 1": "--aplha",
    "choices --models model": "--questions",
    "choices --questions mmlu.jsonl": "--models",
    "answers --problems problems.jsonl": "--samples",
    "answers --samples dpo.jsonl": "--problems",
}
ROWS |= {f"evaluate {flags}": ("evaluate", flags, {}, fragment) for flags, fragment in FLAGS.items()}
BOTH = "--samples samples.jsonl --baseline baseline.jsonl"
for flag in ("samples", "baseline", "out_file"):
    scripts = "evaluate diversity, evaluate winrate --dry_run, evaluate quality --reference there"
    fragment = f"--{flag}: is empty; give a value, or leave the flag out"
    ROWS[f"evaluate --{flag}="] = (scripts, f"{BOTH} --{flag}=", {}, fragment)

for scripts, flags in (("evaluate judge", ""), ("evaluate winrate", "--baseline baseline.jsonl")):
    nobody = ("--cache cache.jsonl --endpoint http://127.0.0.1:9/v1 --retries 0", {"cache.jsonl": ""})
    ROWS[f"{scripts}, nobody there"] = (scripts, f"{flags} {nobody[0]}", nobody[1], "127.0.0.1:9")
JUDGE = ["endpoint localhost:8000", "endpoint http://host:port/v1", "timeout nan", "workers 0", "workers 101"]
JUDGE += ["retries -1", "max_new_tokens 0"]
for flag in JUDGE:
    ROWS[f"judge --{flag}"] = ("evaluate judge", f"--{flag}", {}, f"--{flag}: must be ")
ROWS["judge without a name"] = ("evaluate judge", "--judge_model ' '", {}, "--judge_model : must be the name")
CACHED = [{"key": "a", "answer": 5}, {"key": [1], "answer": "[[A]]"}, {"key": "a", "answer": None}, ["a"]]
for number, row in enumerate(CACHED):
    files = {"cache.jsonl": lines({"key": "a", "answer": "[[A]]"}, row)}
    fragment = "--cache cache.jsonl:2: not an answer of a judge; give another file"
    ROWS[f"cache {number}"] = ("evaluate winrate --dry_run", f"{BOTH} --cache cache.jsonl", files, fragment)

LONG = {"long.jsonl": lines({"prompt": "Why?", "completion": " why?" * 4096})}
flags = "--samples long.jsonl --reference model"
ROWS[f"evaluate quality {flags}"] = ("evaluate quality", flags, LONG, "--reference: a text has")

# ---- choices

CHOICES = {
    "--questions none.csv": "none.csv: no such file",
    "--questions notes.pdf": "notes.pdf: unknown format",
    "--questions pairs.jsonl": "pairs.jsonl:1: needs a 'question'",
    "--questions long.jsonl": "long.jsonl: a text has",
    "--models none": "none",
    "--limit -1": "--limit",
    "--template notes.pdf": "the placeholder {question} is missing",
    "--out_file mmlu.jsonl": "mmlu.jsonl: exists; --overwrite",
    "--picture old.png": "old.png: exists; --overwrite",
    "--picture picture.doc": "--picture",
    "--binary": "mmlu.jsonl:1: --binary",
    "--chat": "chat template",
}
for flags, fragment in CHOICES.items():
    files = OLD | {"notes.pdf": "%PDF-1.7", "long.jsonl": lines(MMLU | {"question": "Why? " * 2048})}
    ROWS[f"choices {flags}"] = ("evaluate choices", flags, files, fragment)
QUESTIONS = [
    (MMLU, {"question": None}, "'question'"),
    (MMLU, {"choices": None}, "'choices'"),
    (MMLU, {"choices": "3456"}, "'choices'"),
    (MMLU, {"choices": [3, 4, 5]}, "'choices'"),
    (MMLU, {"choices": ["4"], "answer": 0}, "2 to 10 'choices'"),
    (MMLU, {"choices": list("abcdefghijk")}, "2 to 10 'choices'"),
    *((MMLU, {"answer": answer}, "'answer'") for answer in (4, -1, True, "E", "?", "4 ", None)),
    # a row of a .csv file with too few fields has None in the others
    *((TRUTHFUL, {key: None}, "needs a 'Question'") for key in ("Question", "Best Answer")),
    (TRUTHFUL, {"Incorrect Answers": " ; "}, "needs a 'Question'"),
]
for number, (row, change, fragment) in enumerate(QUESTIONS):
    files = {"rows.jsonl": lines(MMLU, row | change)}
    ROWS[f"question {number}"] = (
        "evaluate choices",
        "--questions rows.jsonl",
        files,
        "rows.jsonl:2: ",
        fragment,
    )

# ---- answers

ANSWERS = {
    "--problems none.jsonl": "none.jsonl: no such file",
    "--problems dpo.jsonl": "dpo.jsonl:1: needs a 'question'",
    "--samples problems.jsonl": "problems.jsonl:1: needs string 'prompt'",
    "--samples stranger.jsonl": "stranger.jsonl: the prompt 'Who?' holds no question",
    "--samples eggs.jsonl cats.jsonl": "no problem in common",
    "--samples dpo.jsonl dpo.jsonl": "differ in name",
    "--base_samples none.jsonl": "none.jsonl: no such file",
    "--reward_model none": "--reward_model: ",
    "--out_file dpo.jsonl": "dpo.jsonl: exists; --overwrite",
    "--picture old.png": "old.png: exists; --overwrite",
    "--picture picture.doc": "--picture",
}
ROWS |= {
    f"answers {flags}": ("evaluate answers", flags, OLD, fragment) for flags, fragment in ANSWERS.items()
}
PROBLEMS = [
    ({"answer": "#### 5"}, "'question'"),
    (EGGS | {"question": " "}, "'question'"),
    (EGGS | {"answer": "five"}, "'answer'"),
    (EGGS | {"answer": 5}, "'answer'"),
    ({"question": "Why?"}, "'answer'"),
    (ROOTS | {"solution": "It is 5."}, "boxed"),
    ({"problem": "Why?", "solution": None}, "'solution'"),
]
for number, (row, fragment) in enumerate(PROBLEMS):
    files = {"rows.jsonl": lines(EGGS, row)}
    ROWS[f"problem {number}"] = (
        "evaluate answers",
        "--problems rows.jsonl",
        files,
        "rows.jsonl:2: ",
        fragment,
    )
