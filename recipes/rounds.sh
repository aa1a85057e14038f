#!/usr/bin/env bash
# Pairs made on policy (MallowsPO paper, section 5.5), round after round: the policy writes answers, a reward model
# ranks them, the best against the worst become pairs, and the policy is trained on them, from where it is.
#
#     SAMPLES=64 HOW="bradley_terry --pairs 400" REWARD=out/reward recipes/rounds.sh @recipes/society.txt --max_steps 40
#     MODEL=meta-llama/Meta-Llama-3-8B-Instruct PROMPTS=prompts.jsonl REWARD=REWARD ROUNDS=1 \
#         SAMPLES="5 --max_new_tokens 1024" RUN="torchrun --nproc_per_node 8" \
#         recipes/rounds.sh @recipes/llama3_mallows.txt
#
# The first trains the embedded society, for two rounds. Flags of sample.py may follow the number in SAMPLES, and those
# of make_pairs.py the word in HOW. Texts that are cut at sample.py's --max_new_tokens (256) make no pairs. Words after
# the script go to train_mallows.py; CHAT=--chat puts string prompts through the chat template in all three steps. With
# LoRA, each round writes one adapter of the base (docs/guide.md, "On an adapter").
set -eu
root=$(dirname "$0")/..
policy=${MODEL:-$root/data/society/reference}
for round in $(seq "${ROUNDS:-2}"); do
    out=${OUT:-out/rounds}/$round
    mkdir -p "$out"
    ${RUN:-python} "$root/sample.py" ${CHAT:-} --model "$policy" --prompts "${PROMPTS:-$root/data/society/prompts.jsonl}" \
        --num_samples ${SAMPLES:-5} --out_file "$out/samples.jsonl" --resume
    python "$root/data/make_pairs.py" ${CHAT:-} --samples "$out/samples.jsonl" --reward_model "$REWARD" \
        --how ${HOW:-best_worst} --out_file "$out/pairs.jsonl" --overwrite
    ${RUN:-python} "$root/train_mallows.py" "$@" ${CHAT:-} --model "$policy" --data "$out/pairs.jsonl" \
        --out_dir "$out/policy" --resume
    policy=$out/policy
done
