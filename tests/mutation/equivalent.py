"""Survivors that change nothing that is claimed, each with the argument why.

A mutant is listed by its module, the function that holds it, and the text before and after the change, so that the list
stays right when lines move. It is looked up only after claims and tests have let the mutant pass: a listed mutant that
something rejects counts as rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EQUIVALENT", "Equivalent", "reason"]


@dataclass(frozen=True)
class Equivalent:
    """Mutants of one kind, as (function, before, after), and why nothing can notice."""

    module: str
    changes: tuple[tuple[str, str, str], ...]
    why: str


_LARGER = "an outward allowance becomes a little larger: the bound still holds and stays within 1e-6 of the norm"
_BLOCK = "the size of a block: time and memory, not values"
_FLUSH = "concerns devices that take subnormal numbers for zero; this processor does not, and the allowance is 2^-126"
_DIVIDED = "a factor of a line that the next division removes; ranges that reach this arithmetic cannot overflow"

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent("birkhoff.certificates", (("module", "1022", "1023"), ("enclose", "4", "5"), ("enclose", "2", "3"),
               ("_bounds", "2", "3"), ("_ratio_below", "10", "11")), _LARGER),
    Equivalent("birkhoff.certificates", (("certify_product", "10", "11"), ("certify", "10", "11")),
               "the default effort, one step more"),
    Equivalent("birkhoff.certificates", (
        ("module", "32", "33"), ("apply", "self.n <= _SMALL", "self.n < _SMALL"),
        ("apply", "if self.n <= _SMALL: parts.append(_sum([values[:, column, :] * vect...",
         "if not self.n <= _SMALL: parts.append(_sum([values[:, column, :] * ..."),
        ("dominant_vector", "self.n > _SMALL", "self.n >= _SMALL"),
    ), "which of two computations of the same sums, or of x, is used near n = 32: bounds hold for any order and any x"),
    Equivalent("birkhoff.certificates", (("enclose", "True", "False"),),
               "one number for each matrix broadcasts against its components with or without the axis"),
    Equivalent("birkhoff.certificates", (("certify_product", "0", "1"),),
               "what an object without ndim counts as: fewer than three axes either way"),
    Equivalent("birkhoff.certificates", (("_certify", "-1", "-2"), ("_certify", "1", "2")),
               "the other axis of a square, or one empty chunk more"),
    Equivalent("birkhoff.certificates", (
        ("module", "2 ** 25", "2 * 25"), ("module", "2", "3"), ("module", "20", "21"), ("module", "25", "26"),
        ("_certify", "2 ** 20", "2 * 20"), ("_certify", "2", "3"), ("_certify", "20", "21"),
        ("__init__", "1", "2"),
        ("__init__", "len(layers) * self.batch * self.n * self.n <= block",
         "len(layers) * self.batch * self.n * self.n < block"),
        ("_batch_last", "_xp.astype(xp, flat, xp.float64) if convert else flat",
         "_xp.astype(xp, flat, xp.float64) if not convert else flat"),
        ("_certify", "block // (len(layers) * n * n)", "block * (len(layers) * n * n)"),
        ("__init__", "len(layers) * self.batch * self.n * self.n", "len(layers) * self.batch * self.n / self.n"),
        ("__init__", "len(layers) * self.batch * self.n", "len(layers) * self.batch / self.n"),
    ), _BLOCK),
    Equivalent("birkhoff.certificates", (
        ("__init__", "(_TINY32 if single else _TINY64) if self.flushes else 0.0",
         "(_TINY32 if single else _TINY64) if not self.flushes else 0.0"),
        ("_flushes_subnormals", "2.0 ** (-149)", "2.0 * -149"), ("_flushes_subnormals", "1", "2"),
        ("_flushes_subnormals", "if single: probe = xp.full((1,), 2.0 ** (-149), dtype=xp.float32, d...",
         "if not single: probe = xp.full((1,), 2.0 ** (-149), dtype=xp.float3..."),
        ("_flushes_subnormals", "xp.all", "xp.any"), ("_flushes_subnormals", "all", "any"),
        ("_flushes_subnormals", "probe * 1.0", "probe / 1.0"), ("_flushes_subnormals", "1.0", "2.0"),
    ), _FLUSH),
    Equivalent("birkhoff.certificates", (("dominant_vector", "-1", "-2"), ("dominant_vector", "1", "2")),
               "the sums of a symmetric matrix over its rows are those over its columns"),
    Equivalent("birkhoff.certificates", (("dominant_vector", "True", "False"),),
               "signs in x of a signed matrix, which gets no upper bound"),
    Equivalent("birkhoff.certificates", (
        ("_positive", "xp.ones_like", "xp.zeros_like"), ("_positive", "xp.max", "xp.min"),
        ("_positive", "True", "False"), ("_positive", "peak > 0", "peak >= 0"),
    ), "x is only scaled, and stays positive: zeros and what is no number are replaced by the floor"),
    Equivalent("birkhoff.certificates", (
        ("enclose", "low > 0", "low >= 0"), ("_bounds", "collatz < upper", "collatz <= upper"),
        ("_positive", "scaled > _FLOOR", "scaled >= _FLOOR"),
    ), "where equal, either is right"),
    Equivalent("birkhoff.certificates", (("module", "2.0", "4.0"), ("module", "200", "201")),
               "the floor of x: any tiny positive number"),
    Equivalent("birkhoff.certificates", (
        ("_bounds", "xp.max(z_high / x, axis=0) * (1.0 + 2 * _EPS) + 4 * _TINY64",
         "xp.max(z_high / x, axis=0) * (1.0 + 2 * _EPS) - 4 * _TINY64"),
        ("_bounds", "4", "5"),
    ), "z carries 4 n of these already, and Schur's bound is smaller where they can be seen"),
    Equivalent("birkhoff.certificates",
               (("_scaled_norm", "peak > 0", "peak >= 0"), ("_scaled_norm", "xp.ones_like", "xp.zeros_like")),
               "a zero or infinite vector, whose quotient is no number and counts as zero"),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (("SinkhornKnopp", "12", "13"),),
               "from which n on sums are matrix products: time"),
    Equivalent("birkhoff.certificates", (("_scaled_norm", "xp.max", "xp.min"),),
               "the scale against overflow: any positive one gives the same norm where nothing overflows"),
    Equivalent("birkhoff.certificates",
               (("_bounds", "radius * (1.0 + 2 * _EPS)", "radius / (1.0 + 2 * _EPS)"),),
               "the enclosures whose difference the radius is carry more slack than this factor"),
    Equivalent("birkhoff.rounding", (("_shrink", "2.0", "4.0"),),
               "a divisor is enlarged by eight units of roundoff instead of four: within the allowance"),
    Equivalent("birkhoff._math", (
        ("_device_dtypes", "if _xp.library_name(xp) in ('numpy', 'torch', 'cupy'): return ('flo...",
         "if not _xp.library_name(xp) in ('numpy', 'torch', 'cupy'): return (..."),
        ("_device_dtypes", "_xp.library_name(xp) in ('numpy', 'torch', 'cupy')",
         "_xp.library_name(xp) not in ('numpy', 'torch', 'cupy')"),
        ("_device_dtypes", "return ('float32', 'float64')", "return ('float64', 'float32')"),
    ), "a shortcut for what the namespace's inspection answers too; only membership is asked"),
    Equivalent("birkhoff._math", (
        ("reduce_sum", "if accumulate == array.dtype: return xp.sum(array, axis=axis, keepd...",
         "if not accumulate == array.dtype: return xp.sum(array, axis=axis, k..."),
        ("reduce_sum", "accumulate == array.dtype", "accumulate != array.dtype"),
    ), "saves a cast; exchanged, float32 sums are accumulated in float32, which the contract of 4 n u allows"),
    Equivalent("birkhoff._math", (("lower_bound", "array < low", "array <= low"),), "where equal, either is right"),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (
        ("arithmetics", "if dtype_name == 'float32': table.append((_PLAIN['float64'], self, ...",
         "if not dtype_name == 'float32': table.append((_PLAIN['float64'], se..."),
        ("arithmetics", "dtype_name == 'float32'", "dtype_name != 'float32'"),
    ), "which of several safe arithmetics serves a range: time, not values beyond the contract"),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (
        ("init", "frame.xp.max", "frame.xp.min"), ("trajectory", "frame.xp.max", "frame.xp.min"),
        ("step", "frame.xp.min", "frame.xp.max"), ("step", "1.0", "2.0"),
    ), _DIVIDED),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (("init", "frame.xp.ones_like", "frame.xp.zeros_like"),),
               "the first scaling is overwritten before it is read"),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (("module", "True", "False"),),
               "keyword-only fields of a class that adds none"),
    Equivalent("birkhoff.solvers.range_cap", (("cap", "logits < floor", "logits <= floor"),),
               "where equal, either is right"),
    Equivalent("birkhoff.solvers.range_cap", (("pull_cap", "1.0", "2.0"), ("push_cap", "1.0", "2.0")),
               "adds a constant to a first-normalised line, which changes nothing, or a sum over it, which is zero"),
    Equivalent("birkhoff.solvers.protocol", (
        ("from_text", "isinstance(parsed, ast.Call) and isinstance(parsed.func, ast.Name)",
         "isinstance(parsed, ast.Call) or isinstance(parsed.func, ast.Name)"),
    ), "an assertion for the type checker: what to_text writes satisfies both"),
    Equivalent("birkhoff.solvers.protocol", (
        ("to_text", "_write(solver) if text is None else text", "_write(solver) if not text is None else text"),
        ("to_text", "text is None", "text is not None"),
    ), "the text that was kept is what would be written again; keeping it spares a tracer"),
    Equivalent("birkhoff._math", (("module", "87.0", "174.0"), ("module", "708.0", "1416.0")),
               "terms below the smallest normal number in a sum of at least one: time, not values"),
    Equivalent("birkhoff.solvers.range_cap", (("_masks", "logits < peak - range_cap", "logits <= peak - range_cap"),),
               "a logit exactly at the cap: a kink, where either one-sided derivative is right"),
    Equivalent("birkhoff.solvers.euclidean", (
        ("init", "spread > 1.0", "spread >= 1.0"), ("init", "1.0", "2.0"), ("step", "xp.max", "xp.min"),
        ("step", "xp.finfo(values.dtype).eps * (n + 0.25 * reach)", "xp.finfo(values.dtype).eps / (n + 0.25 * reach)"),
        ("step", "n + 0.25 * reach", "n - 0.25 * reach"), ("step", "0.25", "0.5"),
        ("step", "scale <= 1.0", "scale < 1.0"), ("step", "1.0", "2.0"),
    ), "where the scale starts, at which rounding a matrix counts as settled, from which error the ridge is largest: a "
       "step more or less"),
    Equivalent("birkhoff.solvers.euclidean", (
        ("step", "best_objective < objective", "best_objective <= objective"),
        ("step", "value < best_objective - margin", "value <= best_objective - margin"),
        ("step", "value <= best_objective + margin", "value < best_objective + margin"),
        ("step", "slope < best_slope", "slope <= best_slope"),
        ("_at_least_one", "counts > 1.0", "counts >= 1.0"),
        ("step", "scale > _SHRINK", "scale >= _SHRINK"), ("step", "best_error < _SETTLED", "best_error <= _SETTLED"),
    ), "where equal, either is right"),
    Equivalent("birkhoff.solvers.euclidean", (
        ("module", "0.3", "0.6"), ("step", "64.0", "128.0"), ("_solve", "100.0", "200.0"),
    ), "when the scale falls, and how much rounding is allowed for: tuning, with as few steps as measured"),
    Equivalent("birkhoff.solvers.euclidean", (("_lines", "lines > threshold", "lines >= threshold"),),
               "where equal, the entry is zero either way"),
    Equivalent("birkhoff.solvers.euclidean", (
        ("matrix", "total > 0", "total >= 0"), ("matrix", "frame.xp.ones_like", "frame.xp.zeros_like"),
    ), "a sum is near one, or no number and stays so"),
    Equivalent("birkhoff.solvers.euclidean", (
        ("_dual", "total - xp.sum(potentials, axis=(frame.i, frame.j), keepdims=True)",
         "total + xp.sum(potentials, axis=(frame.i, frame.j), keepdims=True)"),
        ("_solve", "eye * (counts + ridge + floor) - overlap + 1.0 / n",
         "eye * (counts + ridge + floor) - overlap - 1.0 / n"),
    ), "the residual adds up to zero, the other side being exact, and so do the potentials"),
    Equivalent("birkhoff.solvers.euclidean", (("matrix", "0", "1"),),
               "a sum that rounding left below one stays so, within the same allowance"),
    Equivalent("birkhoff.solvers.euclidean", (("derivative", "2", "3"),),
               "a third pass on what the second left: rounding"),
    Equivalent("birkhoff.solvers.euclidean", (("init", "0", "1"),), "potentials of zero broadcast along either axis"),
    Equivalent("birkhoff.solvers.euclidean", (
        ("step", "error <= xp.finfo(values.dtype).eps * (n + 0.25 * reach)",
         "error < xp.finfo(values.dtype).eps * (n + 0.25 * reach)"),
        ("step", "error < 1.0", "error <= 1.0"),
    ), "a threshold met exactly: one step more or less"),
    Equivalent("birkhoff.solvers.sinkhorn_damped", (
        ("_log_rate", "xp.ones_like", "xp.zeros_like"), ("_log_rate", "soft > 0.0", "soft >= 0.0"),
    ), "a divisor in the branch that is not selected; of two guards one suffices"),
    Equivalent("birkhoff._math", (
        ("exp_in_sum", "not branch", "branch"),
        ("exp_in_sum", "if not branch: return xp.exp(exponents)", "if not not branch: return xp.exp(exponents)"),
    ), "terms below the smallest normal number in a sum of at least one: time, not values"),
    Equivalent("birkhoff._tangent", (("module", "1e-37", "2e-37"),),
               "the least degree, below every weight that matters"),
    Equivalent("birkhoff._tangent", (
        ("weights", "0", "1"), ("solve_laplacian", "0", "1"), ("solve_flows", "0", "1"), ("kl_derivative", "0", "1"),
    ), "the other axis of a square"),
    Equivalent("birkhoff._tangent", (("solve_laplacian", "xp.abs(value) <= noise", "xp.abs(value) < noise"),),
               "where equal, either is right"),
    Equivalent("birkhoff.solvers.newton", (("module", "1e-30", "2e-30"), ("module", "12", "13")),
               "the weight that joins what underflow has cut, and one more halving: no result depends on which"),
    Equivalent("birkhoff.solvers.newton", (
        ("module", "0.4", "0.8"), ("module", "0.0001", "0.0002"), ("init", "2.0", "4.0"), ("_direction", "2.0", "4.0"),
        ("init", "centred > -xp.inf", "centred >= -xp.inf"),
    ), "how far a step may go before it is looked at: tuning, with as few steps as measured"),
    Equivalent("birkhoff.solvers.newton", (
        ("_gap", "matrix.shape[0] ** 0.5", "matrix.shape[0] * 0.5"), ("_gap", "0", "1"), ("_gap", "0.5", "1.0"),
        ("_move", "2.0 * n ** 0.5", "2.0 / n ** 0.5"), ("_move", "n ** 0.5", "n * 0.5"), ("_move", "0.5", "1.0"),
        ("_move", "slack * (1.0 + span)", "slack / (1.0 + span)"), ("_move", "1.0", "2.0"),
        ("_move", "_SUFFICIENT * length", "_SUFFICIENT / length"),
        ("_move", "slack * (1.0 + span) - _SUFFICIENT * length * slope",
         "slack * (1.0 + span) + _SUFFICIENT * length * slope"),
    ), "how much rounding, or which ten-thousandth of the slope, is allowed for"),
    Equivalent("birkhoff.solvers.newton", (
        ("_move", "dual <= slack * (1.0 + span) - _SUFFICIENT * length * slope",
         "dual < slack * (1.0 + span) - _SUFFICIENT * length * slope"),
    ), "where equal, either is right"),
    Equivalent("birkhoff.solvers.newton", (
        ("_move", "2.0", "4.0"), ("_move", "2.0 * span <= _SURE_STEP", "2.0 * span < _SURE_STEP"),
    ), "from which length on a step is looked at: tuning, with as few steps as measured"),
    Equivalent("birkhoff.solvers.newton", (("_all_numbers", "frame.xp.all", "frame.xp.any"),),
               "for n = 2 a NaN has spread to the whole matrix by then"),
    Equivalent("birkhoff.solvers.newton", (("_gap", "True", "False"),), "a mean broadcasts with or without its axis"),
    Equivalent("birkhoff.solvers.newton", (("step", "1", "2"),),
               "for n = 1 the step is zero, and n = 2 is at its solution from the start"),
    Equivalent("birkhoff.solvers.newton", (("_direction", "0", "1"),),
               "which slice an array of ones takes its shape from"),
    Equivalent("birkhoff.solvers.sinkhorn_log", (("init", "1.0", "2.0"), ("trajectory", "1.0", "2.0")),
               "the path of over-relaxation with weight 1: one more normalisation of a normalised matrix"),
)  # fmt: skip


def reason(module: str, where: str, before: str, after: str) -> str | None:
    """Return the argument for a mutant, or ``None``."""
    for entry in EQUIVALENT:
        if entry.module == module and (where, before, after) in entry.changes:
            return entry.why
    return None
