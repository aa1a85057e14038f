"""metrics/formulas.py against sacrebleu, brute force, enumeration or a case worked out by hand."""

import itertools
import math
import re
import unicodedata

import numpy as np
import pytest
import sacrebleu
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from metrics.formulas import (
    bootstrap,
    cosine_diversity,
    cut_words,
    distinct_n,
    ead,
    pair_score,
    self_bleu,
    unique_share,
    vendi_score,
    words,
)
from metrics.tables import prompt_means

# integers: no row is so short that rounding changes its direction
EMBEDDINGS = st.tuples(st.integers(2, 7), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-9, 9))
)
TEXTS = st.lists(st.text("ab .", max_size=14), min_size=2, max_size=6)  # few characters: n-grams repeat
ANSWERS = st.sampled_from(["A", "B", "tie"])


def pairwise_cosines(embeddings):
    """All cosines, one pair at a time."""
    return np.array([[a @ b / (math.hypot(*a) * math.hypot(*b)) for b in embeddings] for a in embeddings])


def all_ngrams(texts, n):
    """The n-grams of texts of one-letter words, as strings."""
    return [text.split()[i : i + n] for text in texts for i in range(len(text.split()) - n + 1)]


# ---- embeddings


@given(EMBEDDINGS)
def test_embedding_metrics_equal_their_definitions(embeddings):
    assume(embeddings.any(axis=1).all())
    cosines, n = pairwise_cosines(embeddings), len(embeddings)
    off_diagonal = [1 - cosines[i, j] for i in range(n) for j in range(n) if i != j]
    p = np.abs(np.linalg.eigvals(cosines / n))
    vendi = np.exp(-sum(x * np.log(x) for x in p if x > 1e-12))

    assert cosine_diversity(embeddings) == pytest.approx((1 - cosines).sum() / n**2, abs=1e-12)
    assert cosine_diversity(embeddings, distinct=True) == pytest.approx(np.mean(off_diagonal), abs=1e-12)
    assert vendi_score(embeddings) == pytest.approx(vendi, rel=1e-9)
    assert 0 <= cosine_diversity(embeddings) <= 1 + 1e-12
    assert 1 - 1e-9 <= vendi_score(embeddings) <= min(embeddings.shape) + 1e-9


@given(EMBEDDINGS, st.randoms(use_true_random=False))
def test_embedding_metrics_ignore_order_length_and_duplication(embeddings, random):
    assume(embeddings.any(axis=1).all())
    shuffled = random.sample(list(embeddings), len(embeddings))
    scaled = [random.uniform(0.1, 10) * row for row in embeddings]
    for metric in (cosine_diversity, vendi_score):
        for other in (shuffled, scaled, np.repeat(embeddings, 3, axis=0)):
            assert metric(np.array(other)) == pytest.approx(metric(embeddings), rel=1e-9, abs=1e-9)


def test_embedding_metrics_of_known_arrangements():
    same, opposite, corners = np.ones((5, 3)), np.array([[2.0, 0], [-1, 0]]), np.eye(4)
    assert cosine_diversity(same) == cosine_diversity(same, distinct=True) == pytest.approx(0, abs=1e-15)
    assert cosine_diversity(opposite) == pytest.approx(1)
    assert cosine_diversity(opposite, distinct=True) == pytest.approx(2)
    assert cosine_diversity(corners) == pytest.approx(3 / 4)
    assert cosine_diversity(corners, distinct=True) == pytest.approx(1)
    assert vendi_score(same) == pytest.approx(1)
    assert vendi_score(corners) == pytest.approx(4)
    assert vendi_score(np.repeat(corners, [2, 2, 0, 0], axis=0)) == pytest.approx(2)
    assert cosine_diversity(corners[:1]) == 0
    assert math.isnan(cosine_diversity(corners[:1], distinct=True))


def test_distinct_diversity_does_not_depend_on_the_number_of_samples():
    embeddings = np.random.default_rng(0).normal(size=(6, 3)) + 1
    subsets = [embeddings[list(rows)] for rows in itertools.combinations(range(6), 3)]
    paper, distinct = cosine_diversity(embeddings), cosine_diversity(embeddings, distinct=True)
    assert np.mean([cosine_diversity(x, distinct=True) for x in subsets]) == pytest.approx(distinct)
    assert np.mean([cosine_diversity(x) for x in subsets]) == pytest.approx(paper * (2 / 3) / (5 / 6))


@pytest.mark.parametrize("embeddings", [[[1, 2], [0, 0]], [[1, math.nan]], [[1, math.inf]], [1, 2], []])
def test_embeddings_without_direction_are_refused(embeddings):
    for metric in (cosine_diversity, vendi_score):
        with pytest.raises(ValueError, match="embedding"):
            metric(np.array(embeddings, dtype=float))


# ---- words


@pytest.mark.parametrize(
    "text, tokens",
    [
        ('Don\'t stop--he said: "3.5% of 1,000!"', 'Don\'t stop--he said : " 3.5 % of 1,000 ! "'),
        (
            "A well-known 10-year-old (U.S.) e.g. 5, 6.",
            "A well-known 10 - year-old ( U . S . ) e . g . 5 , 6 .",
        ),
        ("“Don’t”—wait…", "“ Don’t ” — wait …"),
        ("cafe\u0301  na\u00efve\n\tCafé", "café naïve Café"),
        ("हिन्दी \u200d👩\u200d🍳", "हिन्दी \u200d👩\u200d🍳"),
        ("한국어 문장", "한국어 문장"),
        ("GPT-4很好，3.5公里。", "GPT-4 很 好 ， 3.5 公 里 。"),
        (" \n", ""),
    ],
)
def test_words(text, tokens):
    assert words(text) == tokens.split()


@given(st.text(st.characters(min_codepoint=9, max_codepoint=126, exclude_characters="&"), max_size=40))
def test_words_of_ascii_are_those_of_sacrebleu(text):
    # 13a joins words at "-\n", and leaves "..5" whole because its pattern skips overlapping matches
    assume(not re.search(r"-\n|[.,]{2}[0-9]|<skipped>", text))
    assert words(text) == Tokenizer13a()(text).split()


CHINESE = st.text("我的果很甜無，。！？、；：《》「」（）　“”—…①→℃％Ａ１ab5.,-' \n%", max_size=40)


@given(CHINESE)
def test_words_of_chinese_are_those_of_sacrebleu(text):
    # as above; and zh splits ".5" and "5." only beside another character, 13a also at the ends of a text
    assume(not re.search(r"[.,]{2}[0-9]", text))
    text = f"果{text}果"
    assert words(text) == TokenizerZh()(text).split()


@given(st.text("กาที่ ລາວ ភាសា မြန်မာ ひらカナー", max_size=40))
def test_words_of_other_scripts_without_spaces_are_characters(text):
    assert words(text) == TokenizerChar()(unicodedata.normalize("NFC", text)).split()


@given(st.text("a5.,-' \n“é\u0301我ก", max_size=20), st.integers(0, 12))
def test_cut_words_keeps_the_first_words(text, budget):
    cut = cut_words(text, budget)
    assert words(cut) == words(text)[:budget]
    assert unicodedata.normalize("NFC", text).startswith(cut)


def test_cut_words_ends_with_the_last_word_and_keeps_white_space():
    assert cut_words(" One\n\ntwo, three. ", 3) == " One\n\ntwo,"
    assert cut_words("One two. ", 9) == "One two."
    assert cut_words("One", 0) == ""
    with pytest.raises(ValueError):
        cut_words("One", -1)


# ---- n-grams


@given(st.lists(st.text("ab ", max_size=12).map(lambda text: " ".join(text.replace(" ", ""))), max_size=5))
def test_distinct_n_equals_its_definition(texts):
    for n in (1, 2, 3):
        grams = all_ngrams(texts, n)
        if not grams:
            assert math.isnan(distinct_n(texts, n)) and math.isnan(ead(texts, n, 8))
            continue
        expected = len({tuple(gram) for gram in grams}) / len(grams)
        assert distinct_n(texts, n) == pytest.approx(expected)
        assert distinct_n(texts[::-1], n) == pytest.approx(expected)
        assert distinct_n(texts * 2, n) == pytest.approx(expected / 2)
        assert 0 < ead(texts, n, 8) <= 1


def test_no_ngram_crosses_texts():
    assert distinct_n(["a b", "b a", "a b"], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct_n(["a", "b"], 2))


@pytest.mark.parametrize("vocabulary, count", [(1, 3), (2, 1), (2, 5), (3, 4), (5, 5)])
def test_ead_divides_by_the_expected_number_of_distinct_ngrams(vocabulary, count):
    draws = list(itertools.product("abcde"[:vocabulary], repeat=count))
    expected = np.mean([len(set(draw)) for draw in draws])
    for draw in draws[:: max(1, len(draws) // 50)]:
        assert ead([" ".join(draw)], 1, vocabulary) == pytest.approx(min(1, len(set(draw)) / expected))


def test_ead_of_a_huge_vocabulary_is_distinct_n():
    texts = ["a b a b c", "b a b d"]
    for vocabulary in (10**15, 10**18, 50257**4):
        assert ead(texts, 2, vocabulary) == pytest.approx(distinct_n(texts, 2), rel=1e-12)


def test_ead_is_one_at_most_and_refuses_a_vocabulary_that_the_texts_contradict():
    assert ead(["a b c d"], 1, 4) == 1  # 4 different words, expected 4 (1 - (3/4)^4) = 2.73
    for vocabulary in (0, -1, 3, math.nan):
        with pytest.raises(ValueError, match="vocabulary"):
            ead(["a b c d"], 1, vocabulary)
    with pytest.raises(ValueError, match="vocabulary"):
        ead([], 1, 0)


# ---- Self-BLEU


def sacrebleu_self_bleu(texts):
    """The definition: one sacrebleu call for each text."""
    lines = [" ".join(words(text)) for text in texts]
    scores = [
        sacrebleu.sentence_bleu(line, lines[:i] + lines[i + 1 :], tokenize="none").score
        for i, line in enumerate(lines)
    ]
    return np.mean(scores) / 100


@given(TEXTS)
def test_self_bleu_is_that_of_sacrebleu(texts):
    assert self_bleu(texts) == pytest.approx(sacrebleu_self_bleu(texts), abs=1e-9)
    assert self_bleu(texts[::-1]) == pytest.approx(self_bleu(texts), abs=1e-12)
    assert 0 <= self_bleu(texts) <= 1 + 1e-12


def test_self_bleu_is_that_of_sacrebleu_for_long_texts():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 90, size=12)
    texts = [" ".join(generator.choice(["fig", "it's", "3.5", "a,", "no."], length)) for length in lengths]
    assert 0.2 < self_bleu(texts) < 0.9
    assert self_bleu(texts) == pytest.approx(sacrebleu_self_bleu(texts), abs=1e-9)


def test_self_bleu_of_known_texts():
    assert self_bleu(["The fig, of course."] * 3) == pytest.approx(1)
    assert self_bleu(["one two three", "four five six", ""]) == 0
    assert math.isnan(self_bleu(["alone"])) and math.isnan(self_bleu([]))
    # 4 tokens, 3 and 2 and 1 matches, no 4-gram: (3/4 2/3 1/2 1/2)^(1/4), the same for both
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_unique_share():
    assert unique_share(["café  au\nlait", " cafe\u0301 au lait ", "Café au lait"]) == pytest.approx(2 / 3)
    assert unique_share(["fig"] * 4) == 1 / 4
    assert math.isnan(unique_share([]))


# ---- judgements


@pytest.mark.parametrize(
    "first, swapped, score",
    [
        ("A", "A", 1.0),
        ("A", "tie", 1.0),
        ("tie", "A", 1.0),
        ("A", "B", 0.5),
        ("B", "A", 0.5),
        ("tie", "tie", 0.5),
        ("B", "B", 0.0),
        ("B", "tie", 0.0),
        ("tie", "B", 0.0),
    ],
)
def test_pair_score(first, swapped, score):
    assert pair_score(first, swapped) == score


@given(ANSWERS, ANSWERS)
def test_pair_scores_of_the_two_contestants_sum_to_one(first, swapped):
    other_side = {"A": "B", "B": "A", "tie": "tie"}
    score = pair_score(first, swapped)
    assert 0 <= score <= 1
    assert pair_score(other_side[swapped], other_side[first]) == 1 - score


@pytest.mark.parametrize("first, swapped", [("A", "C"), ("win", "A"), ("A", None)])
def test_pair_score_refuses_other_judgements(first, swapped):
    with pytest.raises(ValueError, match="judgement"):
        pair_score(first, swapped)


# ---- bootstrap


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    """For a mean of many values, the resampled means are normal with the standard deviation of mean."""
    values = np.random.default_rng(0).normal(3, 2, size=400)
    error = values.std() / 20
    interval = (np.array(bootstrap(values, np.mean, seed=1, resamples=20000)) - values.mean()) / error
    # a 2.5% quantile of 20000 normal draws has standard error sqrt(.025 .975 / 20000) / 0.0584 = 0.019
    np.testing.assert_allclose(interval, [-1.96, 1.96], atol=4 * 0.019)


def test_bootstrap_interval_covers_the_true_mean():
    """The exact coverage at n = 50 is P(|t_49| < 1.96 sqrt(49/50)) = 94.2%, about 94% with 200 resamples."""
    generator = np.random.default_rng(2)
    samples = generator.normal(5, 3, size=(400, 50))
    intervals = [bootstrap(sample, np.mean, seed, resamples=200) for seed, sample in enumerate(samples)]
    covered = np.mean([low <= 5 <= high for low, high in intervals])
    assert abs(covered - 0.94) < 3 * math.sqrt(0.94 * 0.06 / 400)  # three standard errors: 0.036


def test_bootstrap_resamples_the_first_axis():
    generator = np.random.default_rng(3)
    before = generator.normal(size=30)
    paired = np.stack([before, before + 1], axis=1)
    assert bootstrap(paired, lambda x: (x[:, 1] - x[:, 0]).mean(), seed=0) == pytest.approx((1, 1))
    low, high = bootstrap(paired, lambda x: x[:, 0].mean(), seed=0)
    assert low < before.mean() < high


def test_bootstrap_depends_on_the_seed_alone():
    values = np.arange(20.0)
    assert bootstrap(values, np.mean, seed=0) == bootstrap(values, np.mean, seed=0)
    assert bootstrap(values, np.mean, seed=0) != bootstrap(values, np.mean, seed=1)


def test_bootstrap_of_none_one_and_equal_values():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(np.array([]), np.mean, seed=0)
    assert np.isnan(bootstrap(np.array([1.0]), np.mean, seed=0)).all()
    assert bootstrap(np.full(5, 0.5), np.mean, seed=0) == (0.5, 0.5)


def test_prompt_means_leave_out_what_is_missing():
    groups = {"a": [0, 0], "b": [0], "c": [0, 0, 0]}
    means = prompt_means([1.0, 2.0, math.nan, math.nan, 4.0, 5.0], groups)
    assert means[[0, 2]].tolist() == [1.5, 4.5] and math.isnan(means[1])
