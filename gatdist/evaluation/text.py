"""Metrics of texts as strings of characters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from gatdist.common.heartbeat import beat

_START, _END = "\x02", "\x03"  # around each text
_BLEU_ORDER = 4
_MAX_SCORED = 500  # texts of which self-BLEU is the mean, each against all


def ngrams(text: str, n: int) -> list[str]:
    """Return all sequences of n characters; for n > 1 with marks around the text."""
    marked = f"{_START}{text}{_END}" if n > 1 else text
    return [marked[i : i + n] for i in range(len(marked) - n + 1)]


def ngram_divergence(a: Iterable[str], b: Iterable[str], n: int) -> float:
    """Return the Jensen–Shannon divergence of the n-gram distributions, in bits: 0 to 1.

    ::

        ½ Σ p log₂(p/m) + ½ Σ q log₂(q/m),   m = (p + q)/2

    1 if either side has no n-gram.
    """
    p, q = (Counter(gram for text in side for gram in ngrams(text, n)) for side in (a, b))
    num_p, num_q = p.total(), q.total()
    if not num_p or not num_q:
        return 1.0
    total = 0.0
    for gram in sorted(p.keys() | q.keys()):  # fixed order of summation
        mine, theirs = p[gram] / num_p, q[gram] / num_q
        mean = (mine + theirs) / 2
        total += sum(x / 2 * math.log2(x / mean) for x in (mine, theirs) if x)
    return total


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU of each text against all others (Zhu et al. 2018), 0 to 1.

    BLEU (Papineni et al. 2002) on characters up to 4-grams; orders without a match count ½ match
    (Chen & Cherry 2014, method 1). Only the first 500 texts are scored, each against all. 0 for
    fewer than two texts.
    """
    if len(texts) < 2:
        return 0.0
    counts = [[Counter(ngrams(text, n)) for n in range(1, _BLEU_ORDER + 1)] for text in texts]
    tops = [_tops([count[n] for count in counts]) for n in range(_BLEU_ORDER)]
    lengths = Counter(len(text) for text in texts)
    scores = []
    for i in range(min(len(texts), _MAX_SCORED)):
        scores.append(_bleu(i, counts[i], tops, len(texts[i]), lengths))
        beat()
    return sum(scores) / len(scores)


def novelty(real: Iterable[str], fakes: Iterable[str]) -> dict[str, float]:
    """Return the shares of generated texts that are copies, new and well-formed, and distinct.

    A text is well-formed if each of its 3-grams, with its beginning and end, occurs in a real text.
    """
    known, grams = set(), set()
    for text in real:
        known.add(text)
        grams.update(ngrams(text, 3))
    fakes = list(fakes)
    copies = sum(text in known for text in fakes)
    formed = sum(
        text not in known and bool(text) and grams.issuperset(ngrams(text, 3)) for text in fakes
    )
    return {
        "copies": copies / len(fakes),
        "novel_well_formed": formed / len(fakes),
        "distinct": len(set(fakes)) / len(fakes),
    }


_Tops = dict[str, tuple[int, int, int]]


def _tops(counts: Sequence[Counter[str]]) -> _Tops:
    """Return by n-gram the highest count in a text, that text, and the highest of the others."""
    tops: _Tops = {}
    for i, count in enumerate(counts):
        for gram, number in count.items():
            first, owner, second = tops.get(gram, (0, -1, 0))
            if number > first:
                tops[gram] = number, i, first
            elif number > second:
                tops[gram] = first, owner, number
    return tops


def _bleu(
    i: int,
    counts: Sequence[Counter[str]],
    tops: Sequence[_Tops],
    length: int,
    lengths: Counter[int],
) -> float:
    logs = 0.0
    for count, top in zip(counts, tops, strict=True):
        total = count.total()
        if not total:
            return 0.0
        matches = 0.0
        for gram, number in count.items():
            first, owner, second = top[gram]
            matches += min(number, second if owner == i else first)
        logs += math.log(max(matches, 0.5) / total)
    others = (other for other, times in lengths.items() if times > (other == length))
    closest = min(others, key=lambda other: (abs(other - length), other))
    brevity = min(0.0, 1 - closest / length) if length else 0.0
    return math.exp(brevity + logs / _BLEU_ORDER)
