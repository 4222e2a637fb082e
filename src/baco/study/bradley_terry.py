"""Strengths of methods from preferences with ties: Davidson's form of the Bradley–Terry model.

A method of strength s is preferred to one of strength t with odds exp(s) : exp(t), and a tie has
odds exp(tie + (s + t) / 2) beside them (Davidson 1970). The log-likelihood is concave, so Newton's
method finds its maximum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.indicators import Estimate, Floats
from baco.study.clustering import Clusters, Ints, clustered

STEPS = 100
UNBOUNDED = 25.0  # in log odds; the likelihood has no maximum
# Outcomes of a judgment: the left method, a tie, the right method.
LEFT, TIE, RIGHT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Strengths:
    """Fitted strengths.

    Attributes:
        methods: the estimate of every method's log strength; they sum to zero.
        tie: the log odds of a tie between equal methods; None if there is no tie.
    """

    methods: Sequence[Estimate]
    tie: float | None


def davidson(
    left: Ints, right: Ints, outcome: Ints, methods: int, clusters: Clusters
) -> Strengths | None:
    """Fit strengths to judgments.

    Args:
        left, right: numbers of the methods, [N].
        outcome: 0 for the left method, 1 for a tie, 2 for the right method, [N].
        methods: their number.
        clusters: of every judgment.

    Returns:
        None where the judgments do not determine the strengths: too few raters or prompts, or some
        methods were never preferred to the others, or never compared with them.
    """
    if not _connected(left, right, outcome, methods):
        return None
    ties = bool((outcome == TIE).any())
    basis = _basis(methods)
    options = _options(left, right, basis, ties)
    chosen = np.eye(3)[outcome]
    if not ties:
        options, chosen = options[:, [LEFT, RIGHT]], chosen[:, [LEFT, RIGHT]]
    parameters = np.zeros(options.shape[-1])
    likelihood = -np.inf
    step = np.zeros_like(parameters)
    for _ in range(STEPS):
        utilities = options @ (parameters + step)
        shifted = utilities - utilities.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        reached = float((chosen * logs).sum())
        if reached < likelihood - 1e-12 * abs(likelihood):
            step = step / 2
            continue
        gained, likelihood = reached - likelihood, reached
        parameters = parameters + step
        shares = np.exp(logs)
        scores = np.einsum("no,nop->np", chosen - shares, options)
        means = np.einsum("no,nop->np", shares, options)
        spread = np.einsum("no,nop,noq->pq", shares, options, options) - means.T @ means
        try:
            step = np.linalg.solve(spread, scores.sum(0))
        except np.linalg.LinAlgError:
            return None
        if np.abs(parameters).max() > UNBOUNDED:
            return None
        if gained < 1e-10 and np.abs(step).max() < 1e-9:
            break
    else:
        return None
    strengths = basis @ parameters[: methods - 1]
    influence = basis @ (np.linalg.inv(spread) @ scores.T)[: methods - 1]
    estimates = [
        clustered(np.asarray(s), row, clusters).estimate()
        for s, row in zip(strengths, influence, strict=True)
    ]
    present = [estimate for estimate in estimates if estimate is not None]
    if len(present) < methods:
        return None
    return Strengths(present, float(parameters[-1]) if ties else None)


def _options(left: Ints, right: Ints, basis: Floats, ties: bool) -> Floats:
    """What the utility of each outcome is made of, [N, outcomes, parameters]."""
    of_left, of_right = basis[left], basis[right]
    rows = np.stack([of_left, (of_left + of_right) / 2, of_right], axis=1)
    if not ties:
        return rows
    tie = np.broadcast_to(np.array([0.0, 1.0, 0.0])[:, None], (len(left), 3, 1))
    return np.concatenate([rows, tie], axis=-1)


def _basis(methods: int) -> Floats:
    """Orthonormal columns [methods, methods - 1] that each sum to zero."""
    centered = np.eye(methods) - 1 / methods
    columns: NDArray[np.float64] = np.linalg.svd(centered)[0][:, : methods - 1]
    return columns


def _connected(left: Ints, right: Ints, outcome: Ints, methods: int) -> bool:
    """Whether every method was preferred to every other, directly or through others.

    Otherwise the likelihood has no maximum. A tie counts in both directions; where only ties
    connect two methods there may be no maximum either, which the fit notices.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    beaten = np.zeros((methods, methods))
    np.add.at(beaten, (left[outcome != RIGHT], right[outcome != RIGHT]), 1)
    np.add.at(beaten, (right[outcome != LEFT], left[outcome != LEFT]), 1)
    parts, _ = connected_components(csr_array(beaten), directed=True, connection="strong")
    return int(parts) == 1
