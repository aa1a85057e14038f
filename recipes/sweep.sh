#!/usr/bin/env bash
# Train DPL at each alpha of a grid. The runs share the reference's log-probabilities: the first one computes
# them, and writes them to reference_cache/ beside the runs' folders.
#
#     recipes/sweep.sh                                        # the embedded society, the paper's alpha / beta
#     recipes/sweep.sh @recipes/hh_dpl.txt --data FILE        # the paper's runs on HH-RLHF
#     ALPHAS="0.1 0.2" OUT=out/two recipes/sweep.sh --resume  # another grid and folder; continue them
#     RUN="torchrun --nproc_per_node 8" recipes/sweep.sh      # eight processes
set -eu
script=$(dirname "$0")/../train_dpl.py
for alpha in ${ALPHAS:-0.1 0.11 0.12 0.13 0.15 0.2 0.4 1.1}; do
    ${RUN:-python} "$script" "$@" --alpha "$alpha" --out_dir "${OUT:-out/sweep}/alpha_$alpha"
done
