"""Twenty properties that a doubly stochastic projection should have, and the claims that look for a breach of each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PROPERTIES", "Property"]


@dataclass(frozen=True)
class Property:
    """One property: its number, what it says, what goes wrong without it, and the names of its claims."""

    number: int
    statement: str
    catches: str
    claims: tuple[str, ...]


PROPERTIES: tuple[Property, ...] = (
    Property(
        1,
        "sums: the side normalised last is 1 within rounding, the other within the reported error",
        "a wrong order, an epsilon in the divisors",
        ("last_side_exact", "damped_side_below_one", "small_logits_converge", "reported_error_is_true"),
    ),
    Property(
        2,
        "honesty: reported errors are the errors, converged means within tolerance, for each matrix by itself",
        "a stopping rule over the whole batch, a status that is a guess",
        ("reported_error_is_true", "converged_means_within_tolerance", "status_per_matrix"),
    ),
    Property(3, "permutations: f(P X Q) = P f(X) Q", "indexing", ("permutation_equivariance",)),
    Property(4, "transposition exchanges the orders", "axes mixed up", ("transpose_duality",)),
    Property(
        5,
        "shifts: constants added to lines of the first side change nothing, to both sides nothing in the limit",
        "overflow, exp without a shift",
        ("first_side_shift_invariance", "both_sides_shift_invariance"),
    ),
    Property(
        6,
        "scaling: f(log(D A E)) = f(log A) for positive diagonal D and E, which are shifts of the logits",
        "overflow of one line",
        ("both_sides_shift_invariance", "rank_one_gives_uniform"),
    ),
    Property(
        7,
        "idempotence: what is doubly stochastic is a fixed point",
        "temperature, rounded logits",
        ("doubly_stochastic_is_fixed", "euclidean_is_idempotent"),
    ),
    Property(
        8,
        "monotone: KL to the limit, Hilbert error and L1 error do not rise with the iterations",
        "a step that is no normalisation",
        ("kl_to_the_limit_never_rises", "hilbert_contraction", "open_side_never_rises"),
    ),
    Property(
        9,
        "rate: contraction by tanh(D/4)^2 an iteration; at n = 2 within 1/(2k)",
        "iterations that are not run",
        ("hilbert_contraction", "two_by_two_error_below_1_over_2k"),
    ),
    Property(
        10,
        "closed forms: n = 1, n = 2, constants, rank one, circulants",
        "special cases of small n",
        (
            "one_by_one_is_one",
            "two_by_two_closed_form",
            "rank_one_gives_uniform",
            "circulant_in_one_step",
            "kl_projection_of_small_logits",
        ),
    ),
    Property(
        11,
        "norm: lower bound <= norm <= upper bound, for one matrix and for a product",
        "a certificate of rounded values, products of bounds",
        (
            "certificate_holds",
            "certificate_holds_on_every_vertex",
            "certificate_holds_in_bulk",
            "certificate_is_tight",
            "certificate_is_close_on_hard_matrices",
            "product_certificate_holds",
            "product_certificate_is_tight",
            "schur_bounds_every_output",
            "open_side_error_forces_norm_above_one",
            "norm_at_most_sqrt_of_open_sum",
            "trained_depth_certificate_holds",
        ),
    ),
    Property(
        12,
        "identity: a diagonal that is larger by g keeps all but (n-1) e^(1-g) of its mass",
        "clipped logits",
        ("diagonal_gap", "large_diagonal_gives_identity"),
    ),
    Property(
        13,
        "mean and constants: equal streams stay equal, or the mean is conserved",
        "the operator applied transposed",
        (
            "equal_streams_or_mean_kept",
            "composite_gain_is_one",
            "exact_side_of_the_operator",
            "trained_mean_is_conserved",
        ),
    ),
    Property(
        14,
        "gradients: the adjoint, of norm at most 1/2 at the limit, finite, zero for zero, twice differentiable; the "
        "implicit one where converged",
        "dead or wrong gradients",
        (
            "adjoint_identity",
            "gradient_matches_differences",
            "gradient_sums_vanish",
            "gradient_halves_the_norm",
            "gradient_is_finite",
            "zero_upstream_gives_zero",
            "double_backward_works",
            "implicit_equals_unrolled_when_converged",
            "limit_gradient_halves_the_norm",
            "layer_gradient",
        ),
    ),
    Property(
        15,
        "backends: each within the accuracy contract of the exact iteration and of NumPy",
        "a kernel that computes something else",
        ("accuracy_of_the_iteration", "inside_the_enclosure", "conformance_vectors", "agrees_with_numpy"),
    ),
    Property(
        16,
        "batches: f(stack) = stack(f), any batch shape, large stacks; a NaN stays in its matrix",
        "normalisation over the batch, grids that end early",
        (
            "items_are_independent",
            "any_batch_shape",
            "large_stacks",
            "one_bad_matrix_poisons_only_itself",
            "bad_matrix_spares_other_gradients",
        ),
    ),
    Property(
        17,
        "exact finish: both sums 1 within rounding, entries >= 0, moved by at most twice the missing mass",
        "a fill with its factors exchanged",
        (
            "rounding_makes_both_sides_exact",
            "rounding_moves_little",
            "rounding_is_the_algorithm",
            "shrinking_gives_norm_at_most_one",
            "finish_is_nonexpansive",
            "exact_matrices_are_closed",
        ),
    ),
    Property(
        18,
        "inputs are not written, any memory layout works, kind, dtype and shape are kept, no wait for the device",
        "views read as if contiguous",
        (
            "input_is_not_written",
            "any_memory_layout",
            "kind_dtype_shape_kept",
            "half_is_float32_stored",
            "same_bits_twice",
            "does_not_wait_for_the_device",
        ),
    ),
    Property(
        19,
        "Euclidean: feasible, nearest (variational inequality over the permutations), non-expansive, idempotent",
        "a projection on something else",
        (
            "euclidean_is_doubly_stochastic",
            "euclidean_is_nearest",
            "euclidean_is_nonexpansive",
            "euclidean_is_idempotent",
        ),
    ),
    Property(
        20,
        "Birkhoff-von Neumann: weights >= 0 with sum 1, at most (n-1)^2 + 1 permutations, which rebuild the matrix",
        "greedy loops that stop early",
        ("decomposition_rebuilds",),
    ),
)
"""By number; the page of all claims shows them as a table."""
