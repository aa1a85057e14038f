"""Download public data sets and write them in the layouts that this project reads.

    python data/prepare.py --list                                            # all data sets
    python data/prepare.py hh-harmless --out_file hh.jsonl.gz                # pairs: train_*.py --data
    python data/prepare.py hh-harmless --split test --out_file hh_test.jsonl # held-out pairs, and prompts
    python data/prepare.py gsm8k --out_file gsm8k.jsonl                      # evaluate.py answers --problems

Pairs have the keys prompt, chosen and rejected; sample.py reads their prompts. The other data sets keep the
keys that sample.py (prompt, uid), evaluate.py answers (question, answer; problem, solution, level) and
evaluate.py choices (question, choices, answer; TruthfulQA's columns) read. Pairs with an empty answer or
without a preference are left out, and their number is printed.

Files come from the Hugging Face hub, at the commits in the table below, and stay in the hub's cache: an
interrupted download continues. Most are parquet, which needs `pip install pyarrow`. --from_dir reads files
that are already there, under the names that the hub gives them. The licences are the publishers'. HH-RLHF
contains offensive text.

What differs from the papers' data:
- imdb: we know no public file of the pairs that DPO's and MallowsPO's authors used. This is a reproduction by
  others: 25,000 prefixes of about 20 tokens, each with two continuations by GPT-2-large fine-tuned on IMDB;
  the more positive one is chosen.
- stack-exchange: one site (askubuntu.com, 0.2 GB), not all 22 GB. Of each question the best-scored answer is
  chosen and the worst-scored rejected. HTML tags are removed; the licence asks to keep authors and links.
- math: the 500 problems of MATH-500. truthfulqa: evaluate.py choices also reads the authors' .csv as it is.
"""

import gzip
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import (
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import InputError, atomic_write
from common.flags import Flags, flag, parse, require, require_new, run_command
from common.rows import ASSISTANT, last_turn, read_rows

Row = dict[str, Any]


# ---- converters: a publisher's row to ours, or to None if it holds no preference


def keep(*keys: str) -> Callable[[Row], Row]:
    """A converter that copies these keys."""
    return lambda row: {key: row[key] for key in keys}


def hh_pair(row: Row) -> Row | None:
    """Two transcripts with a shared start: the prompt ends with the last "Assistant:" that they share."""
    shared = os.path.commonprefix([row["chosen"], row["rejected"]])
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        return None
    return {"prompt": shared[:end], "chosen": row["chosen"][end:], "rejected": row["rejected"][end:]}


def message_pair(row: Row) -> Row:
    """Two conversations that differ in their last message."""
    *prompt, chosen = row["chosen"]
    return {"prompt": prompt, "chosen": [chosen], "rejected": row["rejected"][-1:]}


def imdb_pair(row: Row) -> Row:
    """Two texts that repeat the prefix which they continue."""
    prefix = row["text"]
    return {"prompt": prefix} | {key: row[key].removeprefix(prefix) for key in ("chosen", "rejected")}


def question_pair(question: str, chosen: str, rejected: str) -> Row:
    """A question with two answers, in HH-RLHF's layout, as policies trained on HH-RLHF are asked."""
    return {"prompt": f"\n\nHuman: {question}{ASSISTANT}", "chosen": f" {chosen}", "rejected": f" {rejected}"}


def shp_pair(row: Row) -> Row:
    """A Reddit post with two comments; label 1 means that readers prefer A."""
    chosen, rejected = "AB" if row["labels"] == 1 else "BA"
    return question_pair(row["history"], row[f"human_ref_{chosen}"], row[f"human_ref_{rejected}"])


def stack_exchange_pair(row: Row) -> Row | None:
    """A question with the best and the worst of its answers, None if all have the same score."""

    def to_text(page: str) -> str:
        return html.unescape(re.sub("<[^>]+>", "", page)).strip()

    chosen, rejected = (best(row["answers"], key=lambda answer: answer["pm_score"]) for best in (max, min))
    if chosen["pm_score"] == rejected["pm_score"]:
        return None
    pair = question_pair(*map(to_text, (row["question"], chosen["text"], rejected["text"])))
    return pair | {"authors": [chosen["author"], rejected["author"]], "links": row["metadata"]}


def truthfulqa_question(row: Row) -> Row:
    """A row of the hub's table under the column names of the authors' .csv."""
    answers = {f"{key} Answers": "; ".join(row[f"{key.lower()}_answers"]) for key in ("Correct", "Incorrect")}
    return {"Question": row["question"], "Best Answer": row["best_answer"]} | answers


# ---- the table


class Source(NamedTuple):
    """A data set on the hub, at a commit or a branch.

    `splits` maps each split, the default first, to the number of rows in its files (None: unknown) and the
    files.
    """

    repo: str
    revision: str
    licence: str
    convert: Callable[[Row], Row | None]
    splits: dict[str, tuple[int | None, list[str]]]


def hh_rlhf(rows: dict[str, int], *folders: str) -> Source:
    """Folders of HH-RLHF; `rows` of all of them together."""
    splits = {split: (n, [f"{folder}/{split}.jsonl.gz" for folder in folders]) for split, n in rows.items()}
    return Source("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", "MIT", hh_pair, splits)


HH_FOLDERS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
# fmt: off
SOURCES = {
    "hh": hh_rlhf({"train": 160_800, "test": 8_552}, *HH_FOLDERS),
    "hh-harmless": hh_rlhf({"train": 42_537, "test": 2_312}, "harmless-base"),
    "hh-helpful": hh_rlhf({"train": 43_835, "test": 2_354}, "helpful-base"),
    "ultrafeedback": Source(
        "HuggingFaceH4/ultrafeedback_binarized", "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85", "MIT",
        message_pair,
        {"train": (61_135, ["data/train_prefs-00000-of-00001.parquet"]),
         "test": (2_000, ["data/test_prefs-00000-of-00001.parquet"])}),
    "ultrafeedback-armorm": Source(
        "princeton-nlp/llama3-ultrafeedback-armorm", "5a7ec94b4d9dceeaba4094084407ce7029e68c57", "MIT",
        message_pair,
        {"train": (59_876, [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]),
         "test": (1_961, ["data/test-00000-of-00001.parquet"])}),
    "imdb": Source(
        "insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english",
        "89a34c1cc6bcbc8accd3e57bac88ccd86ae4680d", "none stated", imdb_pair,
        {"train": (25_000, ["data/train-00000-of-00001-719213d68e9bb42e.parquet"]),
         "test": (25_000, ["data/test-00000-of-00001-9fd2d826f8e29239.parquet"])}),
    "shp": Source(  # on this branch the hub keeps its own conversion of the 54 files on main
        "stanfordnlp/SHP", "refs/convert/parquet", "Reddit's terms", shp_pair,
        {"train": (348_718, [f"default/train/000{i}.parquet" for i in range(2)]),
         "validation": (18_436, ["default/validation/0000.parquet"]),
         "test": (18_409, ["default/test/0000.parquet"])}),
    "stack-exchange": Source(
        "HuggingFaceH4/stack-exchange-preferences", "c7bda74048748f55749cd663c3d8d1025a841fd9",
        "CC-BY-SA-4.0", stack_exchange_pair,
        {"train": (None, [f"data/askubuntu.com/train-0000{i}-of-00005.parquet" for i in range(5)])}),
    "gsm8k": Source(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "MIT", keep("question", "answer"),
        {"test": (1_319, ["main/test-00000-of-00001.parquet"]),
         "train": (7_473, ["main/train-00000-of-00001.parquet"])}),
    "math": Source(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "MIT",
        keep("problem", "solution", "level"), {"test": (500, ["test.jsonl"])}),
    "mmlu": Source(
        "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "MIT",
        keep("question", "subject", "choices", "answer"),
        {"test": (14_042, ["all/test-00000-of-00001.parquet"])}),
    "truthfulqa": Source(
        "truthfulqa/truthful_qa", "741b8276f2d1982aa3d5b832d3ee81ed3b896490", "Apache-2.0",
        truthfulqa_question,
        {"validation": (817, ["generation/validation-00000-of-00001.parquet"])}),
    "arena-hard": Source(
        "lmarena-ai/arena-hard-auto", "c75cc2581ae7ac4b66ce5c804c002fe5a7c6339e", "Apache-2.0",
        keep("uid", "prompt"), {"test": (500, ["data/arena-hard-v0.1/question.jsonl"])}),
    "alpaca-eval": Source(
        "tatsu-lab/alpaca_eval", "7253f4f440699890dfa4059b7aeed3f1463c0147", "CC-BY-NC-4.0",
        lambda row: {"prompt": row["instruction"]}, {"test": (805, ["alpaca_eval.json"])}),
}
# fmt: on


# ---- the command


@dataclass
class PrepareConfig(Flags):
    """Flags of data/prepare.py, after the name of a data set."""

    out_file: str | None = flag(None, "File to write, .jsonl or .jsonl.gz.")
    split: str | None = flag(None, "Split to write; default: the first that --list names.")
    from_dir: str | None = flag(None, "Read the hub's files from this folder, and download nothing.")
    overwrite: bool = flag(False, "Replace --out_file.")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_jsonl = str(self.out_file).endswith((".jsonl", ".jsonl.gz"))
        require(self, "out_file", is_jsonl, "a name that ends in .jsonl or .jsonl.gz")
        require_new(self, "out_file")


def locate(source: Source, file: str, from_dir: str | None) -> Path:
    """Path of one of the hub's files, downloaded unless `from_dir` is given."""
    name = f"{source.repo}/{file}"
    if from_dir:
        path = Path(from_dir, file)
        if not path.is_file():
            command = f"hf download --repo-type dataset --revision {source.revision} {source.repo} {file}"
            raise InputError(f"{path}: no such file; `{command} --local-dir {from_dir}` puts it there")
        return path
    try:
        path = huggingface_hub.hf_hub_download(
            source.repo, file, repo_type="dataset", revision=source.revision
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
        raise InputError(
            f"{name}: not on the hub at {source.revision}, or not public; if it was renamed, correct the "
            "table in data/prepare.py, or give --from_dir"
        ) from None
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: hf_xet
        reason = str(error).split("\n")[0]
        raise InputError(f"{name}: cannot be downloaded ({reason}); give --from_dir if offline") from None
    return Path(path)


def convert_rows(source: Source, paths: list[Path]) -> Iterator[Row | None]:
    """Every row of the files in our layout, None for a row to leave out. Raises InputError naming the row."""
    for path in paths:
        for where, row in read_rows(path):
            try:
                row = source.convert(row)
                answers = [row["chosen"], row["rejected"]] if row and "chosen" in row else []
                empty = not all(last_turn(answer).strip() for answer in answers)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise InputError(f"{where}: not in the layout of {source.repo} ({reason})") from None
            yield None if empty else row


def prepare(name: str, config: PrepareConfig) -> None:
    """Write a split of the data set `name` to config.out_file."""
    source = SOURCES[name]
    split = config.split or next(iter(source.splits))
    if split not in source.splits:
        raise InputError(f"--split {split}: {name} has {', '.join(source.splits)}")
    expected, files = source.splits[split]
    paths = [locate(source, file, config.from_dir) for file in files]
    total = written = 0
    with atomic_write(config.out_file, "wb") as file:
        zipped = config.out_file.endswith(".gz")  # without a time stamp: equal rows make equal bytes
        with gzip.GzipFile("", "wb", mtime=0, fileobj=file) if zipped else nullcontext(file) as out:
            for row in tqdm(convert_rows(source, paths), total=expected, unit="row", disable=None):
                total += 1
                if row is not None:
                    written += 1
                    out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    left_out = f"; {total - written:,} left out: an empty answer, or no preference" if written < total else ""
    print(f"{written:,} rows in {config.out_file}{left_out}")
    if expected and total != expected:
        print(f"warning: {name} {split} has {total:,} rows here, {expected:,} on the hub", file=sys.stderr)


def print_sources() -> None:
    """Print the table, a line for each split."""
    print(f"{'name':21}{'split':11}{'rows':>8}  {'licence':15}hub")
    for name, source in SOURCES.items():
        for split, (rows, _) in source.splits.items():
            count = "?" if rows is None else f"{rows:,}"
            print(f"{name:21}{split:11}{count:>8}  {source.licence:15}{source.repo} @ {source.revision}")


def main() -> None:
    """Prepare the data set that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name == "--list":
        print_sources()
    elif name not in SOURCES:
        raise InputError(f"data/prepare.py {name}: no such data set; give one of {', '.join(SOURCES)}")
    else:
        prepare(name, parse(PrepareConfig, __doc__, sys.argv[2:]))


if __name__ == "__main__":
    run_command(main)
