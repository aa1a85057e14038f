"""Merge an adapter into its base model.

    python merge.py out/dpl out/merged

The result is a plain model, for programs that read no adapters.
"""

import argparse
import os
import shutil
from pathlib import Path

from common.files import InputError
from common.flags import raise_input_error, run_command
from core.hub import load_model, load_reward_model, save_model, save_tokenizer
from core.lora import merge_lora, model_folders, read_adapter_config


def write_merged(adapter: str | Path, out: str | Path, overwrite: bool = False) -> None:
    """Write the folder of a model: an adapter's base with the adapter merged in, and its tokenizer.

    The weights keep the dtype of the base's files, so a bfloat16 base rounds the sum. The folder appears
    whole or not at all. Raises InputError if `out` exists, or with `overwrite` if it is anything but a model.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; --overwrite replaces it")
    if out.exists() and (not (out / "config.json").is_file() or (out / "run.json").exists()):
        raise InputError(f"{out}: is no merged model that --overwrite could replace")
    if any(folder.is_relative_to(out.resolve()) for folder in model_folders(adapter)):
        raise InputError(f"{out}: holds what is merged; name another folder")
    is_reward_model = read_adapter_config(adapter).get("task_type") == "SEQ_CLS"
    model, tokenizer = (load_reward_model if is_reward_model else load_model)(adapter, dtype=None)
    merge_lora(model).to(model.dtype)
    new = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_model(model, new)
        save_tokenizer(tokenizer, new)
        if out.exists():
            shutil.rmtree(out)
        os.replace(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main() -> None:
    """Merge by the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = raise_input_error
    parser.add_argument("adapter", help="Folder of an adapter.")
    parser.add_argument("out", help="Folder for the merged model.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the merged model in OUT.")
    args = parser.parse_args()
    write_merged(args.adapter, args.out, args.overwrite)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
