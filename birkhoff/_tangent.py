r"""Laplacians of positive matrices: the linear algebra of Newton's method and implicit gradients, without cancellation.

For a positive matrix P with row sums r, the matrix :math:`\operatorname{diag}(P^\top 1) - P^\top
\operatorname{diag}(1/r) P` is the Laplacian of a graph: its off-diagonal entries are :math:`-W_{jk}` with

.. math:: W_{jk} = \sum_i P_{ij} P_{ik} / r_i \ge 0

and its rows sum to zero. Eliminating one vertex of a Laplacian leaves a Laplacian, whose weights are *sums* of positive
terms. So the solution is accurate entry by entry however ill-conditioned the matrix is, in float32 too: nothing is ever
subtracted (Grassmann, Taksar and Heyman's observation for Markov chains).

Arrays here have the matrix axes first: ``(line, free line, B)``, lines being the side whose sums are exact.
"""

from __future__ import annotations

from typing import Any

from birkhoff import _math
from birkhoff._layout import Frame

__all__ = ["kl_derivative", "lines_first", "per_free_line", "solve_flows", "solve_laplacian", "weights"]

_TINY = 1e-37  # below every weight that matters; joins what underflow has cut, and keeps 0 / 0 at 0


def lines_first(stack: Any, first: str, frame: Frame) -> Any:
    """The stack as ``(exact line, free line, B)``: rows and columns if columns are normalised first."""
    lines, free = (frame.i, frame.j) if first == "columns" else (frame.j, frame.i)
    if frame.batch == 0:
        return frame.xp.permute_dims(stack, (lines + 3, free + 3, 0))
    return frame.xp.permute_dims(stack, (lines, free, 2))


def per_free_line(vector: Any, first: str, frame: Frame) -> Any:
    """``(free line, B)`` as an array that broadcasts against the stack."""
    xp = frame.xp
    if frame.batch == 0:
        columns = xp.permute_dims(vector, (1, 0))
        return columns[:, None, :] if first == "columns" else columns[:, :, None]
    return vector[None, :, :] if first == "columns" else vector[:, None, :]


def weights(matrix: Any, xp: Any) -> Any:
    """The weights W of a matrix of sums one, in lines-first form, ``(n, n, B)``; its diagonal is meaningless."""
    total = xp.zeros_like(matrix)
    for row in xp.unstack(matrix):
        total = total + row[:, None, :] * row[None, :, :]
    return total


def solve_laplacian(weight: Any, right: Any, xp: Any, *, noise: Any = None) -> Any:
    """Solve ``Laplacian(weight) x = right``, last unknown zero; ``right`` sums to zero. ``(n, n, B), (n, B)``.

    Sources (also those of whole clusters, which elimination adds up) of size at most ``noise``, shape ``(B,)``, count
    as zero: a weak link would turn their rounding into a huge difference.
    """
    eliminated = []
    weight = _math.lower_bound(xp, weight, _TINY)
    for _ in range(right.shape[0] - 1):
        row, value = weight[0, 1:, ...], right[0, ...]
        if noise is not None:
            value = xp.where(xp.abs(value) <= noise, xp.zeros_like(value), value)
        degree = xp.sum(row, axis=0)
        share = row / degree
        eliminated.append((share, value / degree))
        right = right[1:, ...] + share * value
        weight = weight[1:, 1:, ...] + share[:, None, :] * row[None, :, :]
    return _substitute(eliminated, xp.zeros_like(right[0, ...]), xp)


def solve_flows(weight: Any, flow: Any, xp: Any) -> Any:
    r"""Solve ``Laplacian(weight) x = sum_k flow[:, k]``, last unknown zero, for antisymmetric flows; all ``(n, n, B)``.

    A source that is a sum of flows between pairs stays one as vertices are eliminated,

    .. math:: F'_{jk} = F_{jk} + \frac{W_{jp} F_{pk} - W_{kp} F_{pj}}{\sum_l W_{pl}}

    and a flow of the size of its weight stays so. Summed into a source per vertex it would not: a cluster whose large
    inner flows cancel would keep their rounding, and its weak links to the rest would turn that into a huge difference.
    """
    eliminated = []
    for _ in range(weight.shape[0] - 1):
        row, own = weight[0, 1:, ...], flow[0, 1:, ...]
        degree = _math.lower_bound(xp, xp.sum(row, axis=0), _TINY)
        share = row / degree
        eliminated.append((share, xp.sum(own, axis=0) / degree))
        flow = flow[1:, 1:, ...] + (share[:, None, :] * own[None, :, :] - share[None, :, :] * own[:, None, :])
        weight = weight[1:, 1:, ...] + share[:, None, :] * row[None, :, :]
    return _substitute(eliminated, xp.zeros_like(weight[0, 0, ...]), xp)


def _substitute(eliminated: list[tuple[Any, Any]], grounded: Any, xp: Any) -> Any:
    """Back substitution: each unknown is its own value plus the shares of those after it."""
    unknowns = [grounded]
    for share, value in reversed(eliminated):
        unknowns.insert(0, value + xp.sum(share * xp.stack(unknowns), axis=0))
    return xp.stack(unknowns)


def kl_derivative(matrix: Any, direction: Any, frame: Frame) -> Any:
    r"""Derivative of the KL projection at its solution P, applied to a direction G; symmetric, so jvp and vjp alike.

    .. math:: P \circ (G - \lambda 1^\top - 1 \mu^\top), \quad \operatorname{Laplacian}(W)\, \mu = F 1, \quad
              F_{jk} = \sum_i P_{ij} P_{ik} (G_{ij} - G_{ik}) / r_i

    with the actual sums of P. The flows F are sums of differences, so they have the size of the weights: the
    multipliers are bounded by those of G whatever the condition, and a permutation gives zero, not amplified rounding.
    """
    xp = frame.xp
    values, change = (lines_first(stack, "columns", frame) for stack in (matrix, direction))
    sums = _math.lower_bound(xp, xp.sum(values, axis=1), _TINY)
    weight = flow = xp.zeros_like(values)
    for line in range(sums.shape[0]):
        row, move = values[line, ...], change[line, ...]
        both = (row / sums[line, ...])[:, None, :] * row[None, :, :]
        weight = weight + both
        flow = flow + both * (move[:, None, :] - move[None, :, :])
    mu = solve_flows(weight, flow, xp)
    moved = direction - per_free_line(mu, "columns", frame)
    mean = xp.sum(matrix * moved, axis=frame.j, keepdims=True)
    row_sums = _math.lower_bound(xp, xp.sum(matrix, axis=frame.j, keepdims=True), _TINY)
    return matrix * (moved - mean / row_sums)
