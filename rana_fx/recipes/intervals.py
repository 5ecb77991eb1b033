"""95 % confidence intervals of means per token over held-out documents.

In: sums over the tokens of each document, and their numbers. Out: ``Interval``s.

Tokens of one document are alike, so documents are the sample, and both models are measured on the same ones: the interval is of
the mean difference. It is Student's t over documents: the mean is a ratio of two sums (documents differ in length), linearised
around it. With a dozen documents a percentile bootstrap is too narrow (it does not know that the deviation itself is estimated,
for which t widens), and t needs no random numbers, so that equal plans have equal curves.
"""

from __future__ import annotations

import math
import sys

from torch import Tensor

from rana_fx.curve import Interval

LEAST = 8  # documents: with fewer, one that is unlike the others decides
_Z = 1.959963984540054  # normal quantile of 0.975


def mean_interval(sums_N: Tensor, counts_N: Tensor) -> Interval:
    """Of sum(sums) / sum(counts), fp64, one entry per document."""
    mean = float(sums_N.sum() / counts_N.sum())
    half = _half_width(sums_N - mean * counts_N, counts_N)
    return Interval(mean, mean - half, mean + half)


def perplexity_interval(dense_N: Tensor, adapted_N: Tensor, counts_N: Tensor) -> Interval:
    """Of exp(mean adapted loss) - exp(mean dense loss), given sums of losses by document; linearised in both means."""
    count = counts_N.sum()
    dense, adapted = (float(sums_N.sum() / count) for sums_N in (dense_N, adapted_N))
    if max(dense, adapted) > 700:  # exp overflows
        return Interval(*3 * (sys.float_info.max,))
    mean = math.exp(adapted) - math.exp(dense)
    slopes = math.exp(adapted) * (adapted_N - adapted * counts_N) - math.exp(dense) * (dense_N - dense * counts_N)
    half = _half_width(slopes, counts_N)
    return Interval(mean, mean - half, mean + half)


def _half_width(deviations_N: Tensor, counts_N: Tensor) -> float:
    number = len(counts_N)
    variance = float(deviations_N.square().sum()) / float(counts_N.mean()) ** 2 / (number * (number - 1))
    return float(t_quantile(number - 1) * math.sqrt(variance))


def t_quantile(freedom: int) -> float:
    """Of Student's t at 0.975: the Cornish-Fisher expansion, within 1e-3 from 7 degrees of freedom on."""
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))
