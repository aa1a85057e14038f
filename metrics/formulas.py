"""Formulas of the metrics. No file is read here; evaluate.py applies them to files.

How different are the N texts that a model wrote for one prompt? Compute a diversity per prompt and average it
over prompts: texts of different prompts differ anyway.

    cosine_diversity   mean cosine distance of embeddings, 0 = all point the same way   (DPL, equation 44)
    vendi_score        number of equally frequent, unrelated texts that would be as diverse, 1..N
    distinct_n, ead    share of n-grams that are new; ead divides by what chance would give
    self_bleu          overlap of each text with all others; here HIGH means alike
    unique_share       number of different texts / number of texts

Three traps:
- N. Only cosine_diversity(distinct=True) estimates the same number for every N. Equation 44 compares each
  text with itself too, which makes it (N-1)/N of that number. All other metrics change with N. Compare models
  at equal N.
- Length. Long texts repeat words, so distinct_n falls with length; ead falls less if its vocabulary is small.
  Self-BLEU depends on length too. First apply cut_words with one budget to all texts; report their lengths.
- Quality. Random words score as diverse. Report a measure of quality beside every measure of diversity.

Problems with a right answer, and multiple choice:

    pass_at_k                    probability that at least one of k samples is correct
    best_of_n                    probability that the sample with the highest reward of k is correct
    expected_calibration_error   mean |accuracy - confidence| over bins of confidence
    brier_score                  squared distance of the probabilities from the right answer

Is model A better than model B? pair_score averages a judge's answers over both orders of showing two texts.
How far can chance move a mean over prompts? bootstrap gives a 95% interval.
"""

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

OTHER = "(other)"  # any text that the grammar cannot write: misspelt, malformed or missing


# ---- embeddings


def unit_vectors(embeddings: np.ndarray) -> np.ndarray:
    """Scale each row of an (N, d) array to length 1, in float64.

    Raises ValueError if the array is not (N, d) with N >= 1, or if a row is zero or not finite: it then has
    no direction.
    """
    vectors = np.asarray(embeddings, dtype=np.float64)
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"embeddings must be an (N, d) array with N >= 1, found shape {vectors.shape}")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError("an embedding is zero or not finite and has no direction")
    return vectors / norms


def cosine_diversity(embeddings: np.ndarray, *, distinct: bool = False) -> float:
    """Mean cosine distance of one prompt's samples; `embeddings` is (N, d). (DPL, equation 44)

        (1/N^2) sum_ij (1 - cos(x_i, x_j)), with the N terms i = j, which are 0

    Range 0 to 1, no unit. Values from different embedding models cannot be compared. With `distinct` the mean
    is over i != j: N/(N-1) times as much (range 0 to N/(N-1)), with the same expectation for every N, and nan
    for N = 1. Raises ValueError like unit_vectors.

    For unit vectors u the mean of u_i . u_j over all i, j is |mean u|^2. So the diversity is 1 - |mean u|^2,
    which is the variance of u summed over its d coordinates. No N x N matrix is needed.
    """
    units = unit_vectors(embeddings)
    if distinct and len(units) == 1:
        return math.nan
    return float(units.var(axis=0, ddof=int(distinct)).sum())


def vendi_score(embeddings: np.ndarray) -> float:
    """Effective number of different samples; `embeddings` is (N, d). (Friedman & Dieng 2023, cosine kernel)

        exp(-sum_k p_k log p_k),  p_k the eigenvalues of K/N,  K_ij = cos(x_i, x_j)

    Range 1 (all point the same way) to min(N, d), in numbers of samples: k groups of equal size at right
    angles give k. Raises ValueError like unit_vectors.
    """
    units = unit_vectors(embeddings)
    n, d = units.shape
    gram = units @ units.T if n <= d else units.T @ units  # both have the same eigenvalues, apart from zeros
    p = np.linalg.eigvalsh(gram / n)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


# ---- words and n-grams

# A token is one mark, one character of a script without spaces, or a run of others. A run may contain
# apostrophes, a full stop or comma between two digits (3.5), and a hyphen that follows no digit (well-known).
MARKS = (  # ASCII, typography, symbols, Thai, Lao, Burmese, Khmer, then Chinese and Japanese with their marks
    r"!-&(-,./:-@\[-`{-~¡«·»¿\u2012-\u2015\u201a-\u2027\u2030-\u205e\u2100-\u2bff\u0e00-\u0eff\u1000-\u109f"
    r"\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\ufe10-\ufe4f\uff00-\uffef\U00020000-\U000323af"
)
WORD = re.compile(rf"(?:[^\s\-{MARKS}]|(?<![0-9])-|(?<=[0-9])[.,](?=[0-9]))+|\S")


def words(text: str) -> list[str]:
    """Words, marks and characters of scripts without spaces in a text, in Unicode NFC; the case is kept.

    On English the tokens are those of sacrebleu's 13a tokenizer, on Chinese those of its zh, except that
    typographic marks and symbols (“ ” — … →) are always split off and entities (&amp;) are not decoded.
    """
    return WORD.findall(unicodedata.normalize("NFC", text))


def cut_words(text: str, budget: int) -> str:
    """The text, in NFC, up to the end of its first `budget` words(). Raises ValueError if budget < 0."""
    text, end = unicodedata.normalize("NFC", text), 0
    for match in itertools.islice(WORD.finditer(text), budget):
        end = match.end()
    return text[:end]


def ngrams(tokens: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    """All runs of n successive tokens, in order: max(0, len(tokens) - n + 1) of them."""
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def count_ngrams(texts: Iterable[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram of words() occurs in the texts; no n-gram crosses from one text to the next."""
    return Counter(gram for text in texts for gram in ngrams(words(text), n))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Number of different n-grams / number of all n-grams in the texts of one prompt. (Li et al. 2016)

    Range (0, 1], 1 = no n-gram occurs twice; nan if there is no n-gram. Falls with N and with length.
    """
    counts = count_ngrams(texts, n)
    return len(counts) / counts.total() if counts else math.nan


def ead(texts: Sequence[str], n: int, vocabulary: int) -> float:
    """Expectation-adjusted distinct n-grams of the texts of one prompt. (Liu et al. 2022)

        distinct / (V (1 - ((V-1)/V)^C)),  C the number of n-grams

    The denominator is the expected number of different n-grams among C independent, uniform draws from V.
    `vocabulary`, V, is the number of different n-grams OF THIS n that could be written. The number of words
    is too small a V for n > 1: the ratio then passes 1.

    Range (0, 1]; nan if there is no n-gram. With the right V the ratio can still pass 1, for texts that
    repeat less than random draws do; the result is then 1. Words are not drawn uniformly, so ead still
    falls with length. For V much larger than C it equals distinct_n and corrects nothing.
    Raises ValueError if V < 1, or if the texts have more than V different n-grams.
    """
    counts = count_ngrams(texts, n)
    if not vocabulary >= max(1, len(counts)):
        raise ValueError(f"vocabulary {vocabulary}: must be at least the texts' {len(counts)} n-grams, and 1")
    if not counts:
        return math.nan
    if vocabulary == 1:
        return 1.0
    # expm1 and log1p: for large V, (V-1)/V rounds to 1
    expected = -vocabulary * math.expm1(counts.total() * math.log1p(-1 / vocabulary))
    return min(1.0, len(counts) / expected)


def self_bleu(texts: Sequence[str]) -> float:
    """Mean over one prompt's texts of the BLEU-4 of a text with all others as references. (Zhu et al. 2018)

    Range 0 to 1; HIGH means alike. nan for fewer than 2 texts; a text without words has BLEU 0. Rises with N:
    more references hold more matches. The BLEU of a text is sacrebleu.sentence_bleu of words() / 100.

    BLEU clips the count of an n-gram to its largest count in any one reference. For the text that has the
    largest count of all texts, that is the second-largest count; no other text is clipped. One pass finds
    both counts of every n-gram, so the cost of counting is linear in the length of all texts.
    """
    if len(texts) < 2:
        return math.nan
    tokens = [words(text) for text in texts]
    counts = [Counter(gram for n in range(1, 5) for gram in ngrams(text, n)) for text in tokens]
    largest: dict[tuple[str, ...], tuple[int, int, int]] = {}  # largest count, its text, second-largest count
    for index, count in enumerate(counts):
        for gram, c in count.items():
            first, owner, second = largest.get(gram, (0, -1, 0))
            if c > first:
                largest[gram] = c, index, first
            elif c > second:
                largest[gram] = first, owner, c
    scores = []
    for index, count in enumerate(counts):
        matches = [0, 0, 0, 0]
        for gram, c in count.items():
            _, owner, second = largest[gram]
            matches[len(gram) - 1] += second if owner == index else c
        length = len(tokens[index])
        others = (len(other) for i, other in enumerate(tokens) if i != index)
        reference_length = min(others, key=lambda other: (abs(other - length), other))
        scores.append(_bleu(matches, length, reference_length))
    return sum(scores) / len(scores)


def _bleu(matches: list[int], length: int, reference_length: int) -> float:
    """Sentence BLEU from the clipped matches of each order, smoothed as by mteval-v13a (sacrebleu's "exp").

    `matches` is of orders 1 to 4. The k-th order that has no match counts as 1/2^k of a match. An order
    longer than the text is left out.
    """
    if not any(matches):
        return 0.0
    logs, smoothing = [], 1
    for n, match in enumerate(matches[:length], 1):
        if not match:
            smoothing *= 2
        logs.append(math.log((match or 1 / smoothing) / (length - n + 1)))
    return math.exp(min(0.0, 1 - reference_length / length) + sum(logs) / len(logs))


def unique_share(texts: Sequence[str]) -> float:
    """Number of different texts, but for white space, / number of texts; nan for none. Falls as N grows."""
    different = {" ".join(unicodedata.normalize("NFC", text).split()) for text in texts}
    return len(different) / len(texts) if texts else math.nan


# ---- judgements


def pair_score(first: str, swapped: str) -> float:
    """Result of one comparison for its first contestant: win 1.0, tie 0.5, loss 0.0. (MallowsPO, C.3.1)

    `first` is the judge's answer with the first contestant shown first, `swapped` with it shown second. Both
    are from its own view: "A" = it won, "B" = it lost, "tie". Two wins, or a win and a tie, are a win; two
    losses, or a loss and a tie, are a loss; anything else is a tie. (fastchat's show_result.py differs: it
    counts a win and a tie as a tie.) Raises ValueError for any other answer.
    """
    points = {"A": 1, "tie": 0, "B": -1}
    for answer in (first, swapped):
        if answer not in points:
            raise ValueError(f"a judgement must be 'A', 'B' or 'tie', found {answer!r}")
    total = points[first] + points[swapped]
    return 1.0 if total > 0 else 0.0 if total < 0 else 0.5


# ---- problems with a right answer


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimated probability that one of k samples is correct, if c of n samples are. (Chen et al. 2021)

        1 - C(n-c, k) / C(n, k)  =  1 - prod_{i=n-c+1..n} (1 - k/i)

    This is the mean over all subsets of k of the n samples, so it is unbiased for 1 - (1 - p)^k, the DPL
    paper's equation 45. The product does not overflow. Range 0 to 1. Raises ValueError unless 0 <= c <= n and
    1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, found n = {n}, c = {c}, k = {k}")
    if k > n - c:  # every subset has a correct sample
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def best_of_n(correct: Sequence[float], reward: Sequence[float], k: int) -> float:
    """Estimated probability that the sample with the highest reward of k is correct, from n >= k samples.

        sum_i correct_(i) C(i-1, k-1) / C(n, k),  samples (1), ..., (n) in ascending order of reward

    C(i-1, k-1) subsets of k have sample (i) as their best; samples of equal reward are chosen equally often.
    Unbiased, range 0 to 1. Raises ValueError for lists of different lengths, a reward of nan, or k > n.
    """
    correct, reward = np.asarray(correct, dtype=float), np.asarray(reward, dtype=float)
    n = len(correct)
    if not (len(reward) == n and 1 <= k <= n) or np.isnan(reward).any():
        raise ValueError(f"need 1 <= k <= n and n rewards, found n = {n}, k = {k}, rewards {reward}")
    # C(i-1, k-1) / C(n, k) is k/n for i = n, and (i-k)/(i-1) times as much for i - 1 as for i
    ratios = [(i - k) / (i - 1) for i in range(n, 1, -1)]
    weights = k / n * np.cumprod([1.0, *ratios])[::-1]
    _, tie = np.unique(reward, return_inverse=True)
    shares = np.bincount(tie, correct) / np.bincount(tie)  # correct among the samples of equal reward
    return float(weights @ shares[np.sort(tie)])


# ---- calibration


def calibration_edges(confidence: np.ndarray, bins: int = 10, equal_mass: bool = False) -> np.ndarray:
    """Edges of bins of confidence, (bins + 1,): equally wide on [0, 1], or with equally many values in each.

    Bins of equal mass end at quantiles of `confidence`; equal edges are merged, so there may be fewer bins.
    """
    edges = np.arange(bins + 1) / bins
    if equal_mass:
        edges = np.unique([0.0, *np.quantile(confidence, edges[1:-1], method="inverted_cdf"), 1.0])
    return edges


def reliability(confidence: np.ndarray, correct: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """For each bin (lo, hi]: number of values, mean confidence, share correct; (bins, 3).

    The last two are nan for an empty bin. A confidence of exactly 0 belongs to the first bin. Raises
    ValueError for confidences outside [0, 1].
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence is outside [0, 1]")
    index = np.maximum(np.searchsorted(edges, confidence) - 1, 0)
    bins = len(edges) - 1
    counts, totals, hits = (np.bincount(index, w, bins) for w in (None, confidence, correct))
    with np.errstate(invalid="ignore"):
        return np.stack([counts, totals / counts, hits / counts], 1)


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 10, equal_mass: bool = False
) -> float:
    """sum over bins of n_bin / n * |share correct - mean confidence|. (Guo et al. 2017)

    `confidence` (n,) in [0, 1], `correct` (n,) 0 or 1. Bins are (lo, hi], see calibration_edges. Range 0 to
    1. Biased upwards: even for a calibrated model, the share correct of a bin with m answers differs from its
    confidence by about sqrt(conf (1 - conf) / m). Raises ValueError for no values or any outside [0, 1].
    """
    if not len(confidence):
        raise ValueError("the calibration error needs at least one value")
    count, mean, share = reliability(confidence, correct, calibration_edges(confidence, bins, equal_mass)).T
    used = count > 0
    return float(count[used] @ abs(share - mean)[used] / count.sum())


def brier_score(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean over questions of sum_k (p_k - [k is the label])^2; `probs` (n, K), `labels` (n,). (Brier 1950)

    Range 0 to 2; a uniform guess among K options has 1 - 1/K. For two options half of it is (p - y)^2, the
    scale from 0 to 1. Raises ValueError unless rows of `probs` are distributions and labels are 0 to K - 1.
    """
    probs, labels = np.asarray(probs, dtype=float), np.asarray(labels)
    one_hot = labels[:, None] == np.arange(probs.shape[1])
    if not (np.allclose(probs.sum(1), 1, atol=1e-4) and (probs >= 0).all() and one_hot.any(1).all()):
        raise ValueError("a row of probabilities is no distribution, or a label is outside 0 to K - 1")
    return float(np.square(probs - one_hot).sum(1).mean())


# ---- intervals


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """95% percentile bootstrap interval (low, high) of a statistic over prompts. (Efron 1979)

    `values` is (n,) or (n, ...), one entry per prompt, without nan. `resamples` times, n entries are drawn
    with replacement along the first axis, and `statistic` (for example np.mean) maps them to a number. The
    interval runs from the 2.5% to the 97.5% quantile of these numbers, in the unit of the statistic.

    It covers the choice of prompts, not the seed of a training run. With few prompts it is too narrow: for
    n = 10 normal values it contains the true mean about 90% of the time, not 95%. One prompt says nothing
    about the spread of prompts: n = 1 gives (nan, nan). Raises ValueError if `values` is empty.
    """
    values = np.asarray(values)
    n = len(values)
    if n == 0:
        raise ValueError("the bootstrap needs at least one value")
    if n == 1:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    results = [statistic(values[generator.integers(n, size=n)]) for _ in range(resamples)]
    low, high = np.quantile(results, (0.025, 0.975))
    return float(low), float(high)


# ---- distributions over a few values


def frequencies(observed: Iterable[str], values: Iterable[str]) -> dict[str, float]:
    """Share of each of `values` among the observed strings, and of all other strings as OTHER."""
    counts = Counter(observed)
    total = counts.total()
    shares = {value: counts[value] / total for value in values}
    return shares | {OTHER: 1 - sum(counts[value] for value in shares) / total}


def total_variation(p: dict[str, float], q: dict[str, float]) -> float:
    """Half the L1 distance of two distributions; a value that one of them lacks has probability 0 there."""
    return sum(abs(p.get(value, 0.0) - q.get(value, 0.0)) for value in {**p, **q}) / 2


def entropy_bits(distribution: dict[str, float]) -> float:
    """Shannon entropy in bits, OTHER left out and the rest renormalised: misspellings are no diversity."""
    p = [share for value, share in distribution.items() if value != OTHER and share > 0]
    return sum(x / sum(p) * math.log2(sum(p) / x) for x in p)
