"""Samples by prompt, and tables of means over prompts: what the subcommands of evaluate.py share.

A metric is computed for each prompt from that prompt's samples. report_means() prints its mean over prompts
with a 95% bootstrap interval, beside the baseline's and the difference of the two, taken prompt by prompt.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import InputError, atomic_write, error_prefix, write_json
from common.flags import Flags, flag, require, require_new
from common.rows import Sample, read_samples, to_texts
from metrics import formulas
from train_reward import load_scorer

Groups = dict[str, list[Sample]]  # a file's samples by prompt
Columns = dict[str, np.ndarray]  # metric: its value for each prompt, nan where it is not defined


@dataclass
class SamplesConfig(Flags):
    """Flags of the subcommands that read samples of prompts."""

    samples: str = flag("out/dpl/samples.jsonl", "File of sample.py or of data/export.py.")
    baseline: str | None = flag(None, "Another policy's samples of the same prompts, to compare with.")
    out_file: str | None = flag(None, "Also write all results to this file, as JSON.")
    overwrite: bool = flag(False, "Replace --out_file.")
    chat: bool = flag(False, "Put string prompts through the chat template of the models below.")
    seed: int = flag(0, "Seed of the bootstrap.")


def read_files(config: SamplesConfig) -> list[Groups]:
    """The samples and, if given, the baseline's: only those of prompts that are in both files.

    Raises InputError if no prompt is, or if --out_file exists without --overwrite.
    """
    require_new(config, "out_file")
    paths = [path for path in (config.samples, config.baseline) if path]
    files = [read_samples(path) for path in paths]
    shared = [prompt for prompt in files[0] if prompt in files[-1]]
    if not shared:
        raise InputError(f"{paths[1]}: has no prompt in common with {paths[0]}")
    for path, groups in zip(paths, files, strict=True):
        if left := len(groups) - len(shared):
            print(f"warning: {path}: {left} prompts are not in the other file: left out", file=sys.stderr)
    return [{prompt: groups[prompt] for prompt in shared} for groups in files]


def first_samples(files: list[list[list]]) -> list[list[list]]:
    """Of each prompt the first samples, as many as every file has; files[i][j] are file i's of prompt j."""
    counts = [min(map(len, groups)) for groups in zip(*files, strict=True)]
    return [[group[:n] for group, n in zip(groups, counts, strict=True)] for groups in files]


def equally_many(config: SamplesConfig, files: list[Groups]) -> list[Groups]:
    """The files with first_samples() of each prompt; says so if some are left out."""
    cut = first_samples([list(groups.values()) for groups in files])
    for path, groups, kept in zip((config.samples, config.baseline), files, cut, strict=False):
        if len(flatten(groups)) > sum(map(len, kept)):
            most = f"{max(map(len, kept))} of up to {max(map(len, groups.values()))}"
            print(f"warning: {path}: only the first {most} samples of a prompt are compared", file=sys.stderr)
    return [dict(zip(groups, kept, strict=True)) for groups, kept in zip(files, cut, strict=True)]


def report_means(config: SamplesConfig, columns: list[Columns], files: list[Groups]) -> None:
    """Print means over prompts, their intervals and what the files hold; write --out_file."""
    heads = ("samples", "baseline", "difference") if len(columns) == 2 else ("samples",)
    print(f"{'mean over prompts [95% interval]':36}" + "".join(f"{head:>26}" for head in heads) + "  prompts")
    result: dict[str, dict[str, dict[str, Any]]] = {}
    undefined = np.full(len(files[0]), math.nan)  # a file may have no prompt with, say, two good samples
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, undefined) for column in columns]
        if len(values) == 2:
            values.append(values[0] - values[1])
        line, row = f"{name:36}", result.setdefault(name, {})
        for head, x in zip(heads, values, strict=True):
            if len(x := x[~np.isnan(x)]):
                low, high = formulas.bootstrap(x, np.mean, config.seed)
                row[head] = {"mean": x.mean(), "low": low, "high": high, "prompts": len(x)}
            cell = "{mean:.3g} [{low:.3g}, {high:.3g}]".format(**row[head]) if head in row else "-"
            line += f" {cell:>25}"
        print(line + f"{min((cell['prompts'] for cell in row.values()), default=0):9}")
    for path, groups in zip((config.samples, config.baseline), files, strict=False):
        ends = [sample.finish for group in groups.values() for sample in group]
        cut = f"{ends.count('length') / len(ends):.1%}" if any(ends) else "an unknown share"
        print(f"{path}: {len(ends):,} samples of {len(groups)} prompts, {cut} cut at the length limit")
    if config.out_file:
        write_json(config.out_file, {"flags": asdict(config), "metrics": result})


def flatten(groups: Groups) -> list[Sample]:
    """All samples, prompt by prompt."""
    return [sample for group in groups.values() for sample in group]


def texts_by_prompt(groups: Groups) -> list[list[str]]:
    """The texts of each prompt's samples."""
    return [[sample.text for sample in group] for group in groups.values()]


def split(values: Sequence[float], groups: Groups) -> list[np.ndarray]:
    """Values of flatten(groups), as one array per prompt."""
    ends = np.cumsum([len(group) for group in groups.values()])
    return np.split(np.asarray(values, dtype=float), ends[:-1])


def prompt_means(values: Sequence[float], groups: Groups) -> np.ndarray:
    """Mean over each prompt of values of flatten(groups), nan left out; nan if nothing is left."""
    parts = [part[~np.isnan(part)] for part in split(values, groups)]
    return np.array([part.mean() if len(part) else math.nan for part in parts])


def sample_rewards(files: list[Groups], path: str, chat: bool) -> list[np.ndarray]:
    """The reward of every sample, in the order of flatten(groups), for each file."""
    with error_prefix("--reward_model"):
        samples = [sample for groups in files for sample in flatten(groups)]
        rewards = load_scorer(path)(*to_texts(samples, chat))
    return np.split(rewards, np.cumsum([len(flatten(groups)) for groups in files])[:-1])


def mean_and_error(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, the training runs, and its standard error; the error is 0 for a single run.

    For three runs, the 95% interval is the mean ± 4.3 standard errors, not ± 2 (Student's t).
    """
    values = np.asarray(values, dtype=float)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(0), spread / math.sqrt(len(values))


# ---- pictures


def check_outputs(config: Any) -> None:
    """Raise InputError if --out_file or --picture exists without --overwrite, or --picture cannot be drawn.

    That needs matplotlib and a name that ends in .png or .pdf.
    """
    is_picture = config.picture is None or config.picture.endswith((".png", ".pdf"))
    require(config, "picture", is_picture, "a .png or .pdf file")
    require_new(config, "out_file", "picture")
    if config.picture:
        new_figure(1, 1)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of width x height inches. Raises InputError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--picture: needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as .png or .pdf, by the name of the file; atomically."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=150)
    print(f"wrote {path}")
