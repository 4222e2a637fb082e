"""Agreement between raters: Krippendorff's alpha and Gwet's AC, with intervals.

Ratings are a table of units and raters; most cells are empty, because a rater sees few of the
units. Alpha is 1 for perfect agreement and 0 for what chance would give. Where nearly all ratings
are the same, chance agreement is so high that alpha is low even though raters agree; AC is not
affected by that (Gwet 2008). Both take categories as ordinal.
"""

from dataclasses import dataclass

import numpy as np

from baco.evaluation.indicators import Estimate, Floats
from baco.study.clustering import Ints, Mean


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree on one question.

    Attributes:
        alpha, gwet: with 95% intervals; None where they are undefined.
        equal: share of equal ratings among all pairs of ratings of a unit.
        units: with two ratings or more.
        raters: who gave at least one of these.
    """

    alpha: Estimate | None
    gwet: Estimate | None
    equal: float
    units: int
    raters: int


def krippendorff_alpha(counts: Floats, weights: Floats | None = None) -> Floats:
    """Krippendorff's ordinal alpha (2011).

    Args:
        counts: how many raters gave a unit each category, [units, categories in order].
        weights: of the units, [..., units]; by default 1.

    Returns:
        [...]; NaN where no unit has two ratings or all ratings are equal.
    """
    pairable = counts.sum(-1) >= 2
    counts = counts[pairable]
    weights = np.ones(len(pairable)) if weights is None else weights
    categories = counts.shape[-1]
    pairs = counts[:, :, None] * counts[:, None, :] - np.eye(categories) * counts[:, :, None]
    pairs /= counts.sum(-1)[:, None, None] - 1
    coincidences = np.tensordot(weights[..., pairable], pairs, axes=1)  # [..., c, c]
    margins = coincidences.sum(-1)
    total = margins.sum(-1)
    # The distance of two categories is the number of ratings between their middles.
    middle = np.cumsum(margins, axis=-1) - margins / 2
    distances = (middle[..., :, None] - middle[..., None, :]) ** 2
    observed = (coincidences * distances).sum((-2, -1))
    expected = (margins[..., :, None] * margins[..., None, :] * distances).sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha: Floats = 1 - (total - 1) * observed / np.where(expected > 0, expected, np.nan)
    return alpha


def gwet_ac(counts: Floats, weights: Floats | None = None) -> Floats:
    """Gwet's AC2 (2014) with Gwet's ordinal weights.

    Arguments and result as in `krippendorff_alpha`.
    """
    weights = np.ones(len(counts)) if weights is None else weights
    categories = np.arange(counts.shape[-1])
    steps = np.abs(categories[:, None] - categories).astype(np.float64)
    between = steps * (steps + 1) / 2
    similar = 1 - between / between.max()
    size = counts.sum(-1)
    rated, pairable = size >= 1, size >= 2
    with np.errstate(invalid="ignore", divide="ignore"):
        agreeing = (counts * (counts @ similar - 1)).sum(-1) / (size * (size - 1))
        share = counts / size[:, None]
        used = weights[..., pairable]
        agreed = (used @ agreeing[pairable]) / used.sum(-1)
        used = weights[..., rated]
        usual = (used @ share[rated]) / used.sum(-1)[..., None]
        count = len(categories)
        chance = similar.sum() / (count * (count - 1)) * (usual * (1 - usual)).sum(-1)
        ac: Floats = (agreed - chance) / (1 - chance)
    return ac


def agreement(ratings: Floats, prompt: Ints, categories: int) -> Agreement | None:
    """The agreement of raters, with intervals for other raters and other prompts.

    The error is a jackknife's: prompts are left out one by one, and so are raters; both variances
    are added. A bootstrap over raters would draw a rater twice, who then agrees with himself.

    Args:
        ratings: from 0, [units, raters]; NaN where a rater did not rate a unit.
        prompt: of every unit, from 0, [units].
        categories: their number.

    Returns:
        None where no unit has two ratings.
    """
    rated = ~np.isnan(ratings)
    if not (rated.sum(-1) >= 2).any():
        return None
    # Units with one rating count for the chance agreement of AC.
    used = rated.any(-1)
    ratings, prompt = ratings[used], np.unique(prompt[used], return_inverse=True)[1]
    ratings = ratings[:, rated.any(0)]
    single = (ratings[..., None] == np.arange(categories)).astype(np.float64)  # [u, r, c]
    counts = single.sum(1)
    without_prompt = np.arange(prompt.max() + 1)[:, None] != prompt
    estimates: list[Estimate | None] = []
    for statistic in (krippendorff_alpha, gwet_ac):
        whole = float(statistic(counts))
        by_prompt = statistic(counts, without_prompt.astype(np.float64))
        by_rater = np.array(
            [statistic(counts - single[:, rater]) for rater in range(ratings.shape[1])]
        )
        estimates.append(_jackknife(whole, by_prompt, by_rater))
    size = counts.sum(-1)
    equal = float((counts * (counts - 1)).sum() / (size * (size - 1)).sum())
    compared = single[size >= 2].any((0, 2))
    return Agreement(estimates[0], estimates[1], equal, int((size >= 2).sum()), int(compared.sum()))


def _jackknife(whole: float, *without: Floats) -> Estimate | None:
    """A figure with its interval from the figures without one cluster each, way by way."""
    variance, spread = 0.0, 0.0
    for figures in without:
        left = figures[~np.isnan(figures)]
        if len(left) < 2:
            return None
        part = (len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum())
        variance += part
        spread += part**2 / (len(left) - 1)
    if np.isnan(whole):
        return None
    freedom = variance**2 / spread if spread > 0 else 1.0
    coefficient = Mean(np.asarray(whole), np.asarray(np.sqrt(variance)), np.asarray(freedom))
    return coefficient.estimate(-1.0, 1.0)
