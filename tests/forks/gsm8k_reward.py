"""A reward of one's own: 1 for a right answer to a problem of GSM8K, else 0."""

from common.flags import run_command
from core.trainer import parse_run
from metrics.equality import gsm8k_answer
from train_rl import RLConfig, train


def reward(rows, texts):
    return [gsm8k_answer(text) == gsm8k_answer(row["answer"]) for row, text in zip(rows, texts)]


run_command(lambda: train(parse_run(RLConfig, __doc__), reward))
