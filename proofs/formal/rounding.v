(** Altschuler-Weed-Rigollet rounding (2017, Algorithm 2): rows scaled down to at most 1, then columns, then one rank-one
    term. The first two steps already give norm <= 1; all three give exact marginals, for every non-negative matrix. *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.
From birkhoff_formal Require Import stochastic spectral.

Section Rounding.
Variable R : realFieldType.
Variable n : nat.
Implicit Types A : 'M[R]_n.

(** [shrink r] is the factor min(1, 1/r), and 1 for r = 0. *)
Definition shrink (r : R) := if 1 < r then r^-1 else 1.
Definition scale_rows A : 'M[R]_n := \matrix_(i, j) (shrink (\sum_k A i k) * A i j).
Definition scale_cols A : 'M[R]_n := \matrix_(i, j) (A i j * shrink (\sum_k A k j)).
Definition nonexpansive_form A := scale_cols (scale_rows A).

Lemma shrink_ge0 r : 0 <= shrink r.
Proof. by rewrite /shrink; case: (ltP 1 r) => [r1|_]; rewrite ?ler01 // invr_ge0 (le_trans ler01) // ltW. Qed.

Lemma shrink_le1 r : shrink r <= 1.
Proof. by rewrite /shrink; case: (ltP 1 r) => [r1|_]; rewrite ?lexx // invf_le1 ?(lt_trans ltr01) // ltW. Qed.

Lemma shrink_mul r : shrink r * r <= 1.
Proof. by rewrite /shrink; case: (ltP 1 r) => r1; rewrite ?mul1r // mulVf // gt_eqF // (lt_trans ltr01). Qed.

Lemma scale_rows_nonneg A : nonneg A -> nonneg (scale_rows A).
Proof. by move=> A0 i j; rewrite mxE mulr_ge0 ?shrink_ge0. Qed.

Lemma scale_cols_nonneg A : nonneg A -> nonneg (scale_cols A).
Proof. by move=> A0 i j; rewrite mxE mulr_ge0 ?shrink_ge0. Qed.

Lemma scale_rows_sum A i : \sum_j scale_rows A i j <= 1.
Proof. by under eq_bigr => j _ do rewrite mxE; rewrite -mulr_sumr shrink_mul. Qed.

Lemma scale_cols_sum A j : \sum_i scale_cols A i j <= 1.
Proof. by under eq_bigr => i _ do rewrite mxE; rewrite -mulr_suml mulrC shrink_mul. Qed.

Lemma scale_cols_le A i j : nonneg A -> scale_cols A i j <= A i j.
Proof. by move=> A0; rewrite mxE ler_pimulr // shrink_le1. Qed.

(** The two-step form: all sums at most 1 ... *)
Lemma nonexpansive_sub A : nonneg A -> sub (nonexpansive_form A) 1 1.
Proof.
move=> A0; have B0 := scale_rows_nonneg A0; split.
- exact: scale_cols_nonneg.
- move=> i; apply: le_trans (scale_rows_sum A i).
  by apply: ler_sum => j _; exact: scale_cols_le.
- by move=> j; exact: scale_cols_sum.
Qed.

(** ... hence norm at most 1, whatever the input was. *)
Lemma nonexpansive_norm A (x : 'cV[R]_n) : nonneg A -> sqn (nonexpansive_form A *m x) <= sqn x.
Proof. by move=> A0; have [B0 Br Bc] := nonexpansive_sub A0; exact: substoch_nonexpansive. Qed.

(** It leaves a doubly stochastic matrix alone. *)
Lemma nonexpansive_fix A : dstoch A -> nonexpansive_form A = A.
Proof.
move=> [A0 Ar Ac].
have E : scale_rows A = A by apply/matrixP => i j; rewrite mxE Ar /shrink ltxx mul1r.
by rewrite /nonexpansive_form E; apply/matrixP => i j; rewrite mxE Ac /shrink ltxx mulr1.
Qed.

(** ** The rank-one correction *)

Section Correction.
Variable A2 : 'M[R]_n.
Hypothesis A2_sub : sub A2 1 1.

Definition row_gap i := 1 - \sum_j A2 i j.
Definition col_gap j := 1 - \sum_i A2 i j.
Definition gap := \sum_i row_gap i.
Definition corrected : 'M[R]_n := \matrix_(i, j) (A2 i j + row_gap i * col_gap j / gap).

Lemma row_gap_ge0 i : 0 <= row_gap i.
Proof. by case: A2_sub => _ Ar _; rewrite subr_ge0. Qed.

Lemma col_gap_ge0 j : 0 <= col_gap j.
Proof. by case: A2_sub => _ _ Ac; rewrite subr_ge0. Qed.

(** Both gaps hold the same mass. *)
Lemma gap_col : \sum_j col_gap j = gap.
Proof. by rewrite /gap /row_gap /col_gap !sumrB exchange_big. Qed.

(** A vanishing gap needs no correction (and the division by 0 in [corrected] is harmless). *)
Lemma gap0_row i : gap = 0 -> row_gap i = 0.
Proof.
move=> g0; have := @psumr_eq0P _ _ predT row_gap (fun k _ => row_gap_ge0 k) g0 i isT.
exact.
Qed.

Lemma gap0_col j : gap = 0 -> col_gap j = 0.
Proof.
rewrite -gap_col => g0.
have := @psumr_eq0P _ _ predT col_gap (fun k _ => col_gap_ge0 k) g0 j isT.
exact.
Qed.

Lemma corrected_nonneg : nonneg corrected.
Proof.
case: A2_sub => A0 _ _ i j; rewrite mxE addr_ge0 //.
rewrite divr_ge0 ?mulr_ge0 ?row_gap_ge0 ?col_gap_ge0 //.
by apply: sumr_ge0 => k _; exact: row_gap_ge0.
Qed.

Lemma corrected_rows : rowst corrected.
Proof.
move=> i; under eq_bigr => j _ do rewrite mxE.
rewrite big_split /=; have -> : \sum_j row_gap i * col_gap j / gap = row_gap i.
  under eq_bigr => j _ do rewrite -mulrA mulrC -mulrA.
  rewrite -mulr_suml gap_col mulrA.
  case: (eqVneq gap 0) => [g0|g0]; first by rewrite gap0_row // mulr0.
  by rewrite divff // mul1r.
by rewrite /row_gap addrC subrK.
Qed.

Lemma corrected_cols : colst corrected.
Proof.
move=> j; under eq_bigr => i _ do rewrite mxE.
rewrite big_split /=; have -> : \sum_i row_gap i * col_gap j / gap = col_gap j.
  under eq_bigr => i _ do rewrite -mulrA.
  rewrite -mulr_suml -/gap mulrCA.
  case: (eqVneq gap 0) => [g0|g0]; first by rewrite gap0_col // mul0r.
  by rewrite divff // mulr1.
by rewrite /col_gap addrC subrK.
Qed.

(** Exact marginals, for every matrix with sums at most 1. *)
Lemma corrected_dstoch : dstoch corrected.
Proof. by split; [exact: corrected_nonneg | exact: corrected_rows | exact: corrected_cols]. Qed.
End Correction.

(** The whole algorithm: exact marginals and norm at most 1 for every non-negative input. *)
Definition rounded A := corrected (nonexpansive_form A).

Lemma rounding_dstoch A : nonneg A -> dstoch (rounded A).
Proof. by move=> A0; apply: corrected_dstoch; exact: nonexpansive_sub. Qed.

Lemma rounding_norm A (x : 'cV[R]_n) : nonneg A -> sqn (rounded A *m x) <= sqn x.
Proof. by move=> A0; apply: dstoch_nonexpansive; exact: rounding_dstoch. Qed.

Lemma rounding_fix A : dstoch A -> rounded A = A.
Proof.
move=> D; rewrite /rounded nonexpansive_fix //; apply/matrixP => i j; rewrite mxE.
by case: D => _ Ar _; rewrite /row_gap Ar subrr !mul0r addr0.
Qed.
End Rounding.
