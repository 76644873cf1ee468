(** Sinkhorn-Knopp steps on positive matrices: positivity, exact sums after any number of steps, fixed points, and the
    symmetries of the iteration (scaling, permutation, transposition, cross ratios). *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.
From birkhoff_formal Require Import stochastic.

Section Sinkhorn.
Variable R : realFieldType.
Variable n : nat.
Implicit Types A B : 'M[R]_n.

Definition pos A := forall i j, 0 < A i j.
Definition rownorm A : 'M[R]_n := \matrix_(i, j) (A i j / \sum_k A i k).
Definition colnorm A : 'M[R]_n := \matrix_(i, j) (A i j / \sum_k A k j).

(** One full iteration: rows last is the order of the paper (columns first), columns last the order of DeepSeek-V4. *)
Definition sk A := colnorm (rownorm A).
Definition sk_rows_last A := rownorm (colnorm A).

Lemma rowsum_pos A i : pos A -> 0 < \sum_k A i k.
Proof.
move=> A0; rewrite (bigD1 i) //=; apply: (lt_le_trans (A0 i i)).
by rewrite ler_addl; apply: sumr_ge0 => k _; exact: ltW.
Qed.

Lemma colsum_pos A j : pos A -> 0 < \sum_k A k j.
Proof.
move=> A0; rewrite (bigD1 j) //=; apply: (lt_le_trans (A0 j j)).
by rewrite ler_addl; apply: sumr_ge0 => k _; exact: ltW.
Qed.

(** ** A step keeps positivity and makes its side exact *)

Lemma rownorm_pos A : pos A -> pos (rownorm A).
Proof. by move=> A0 i j; rewrite mxE divr_gt0 // rowsum_pos. Qed.

Lemma rownorm_sum A : pos A -> rowst (rownorm A).
Proof.
move=> A0 i; under eq_bigr => j _ do rewrite mxE.
by rewrite -mulr_suml divff // gt_eqF // rowsum_pos.
Qed.

Lemma colnorm_pos A : pos A -> pos (colnorm A).
Proof. by move=> A0 i j; rewrite mxE divr_gt0 // colsum_pos. Qed.

Lemma colnorm_sum A : pos A -> colst (colnorm A).
Proof.
move=> A0 j; under eq_bigr => i _ do rewrite mxE.
by rewrite -mulr_suml divff // gt_eqF // colsum_pos.
Qed.

(** After any number of iterations every entry is positive, and after at least one the last-normalised side is exact. *)
Lemma sk_iter A k : pos A -> pos (iter k sk A) /\ (0 < k -> colst (iter k sk A))%N.
Proof.
move=> A0; elim: k => [|k [IH _]]; first by split.
split => [|_] /=; first by apply/colnorm_pos/rownorm_pos.
by apply/colnorm_sum/rownorm_pos.
Qed.

Lemma sk_rows_last_iter A k : pos A ->
  pos (iter k sk_rows_last A) /\ (0 < k -> rowst (iter k sk_rows_last A))%N.
Proof.
move=> A0; elim: k => [|k [IH _]]; first by split.
split => [|_] /=; first by apply/rownorm_pos/colnorm_pos.
by apply/rownorm_sum/colnorm_pos.
Qed.

(** A doubly stochastic matrix is a fixed point, and a positive fixed point of both steps is doubly stochastic. *)
Lemma sk_fix A : pos A -> dstoch A -> sk A = A.
Proof.
move=> A0 [_ Ar Ac].
have E : rownorm A = A by apply/matrixP => i j; rewrite mxE Ar divr1.
by rewrite /sk E; apply/matrixP => i j; rewrite mxE Ac divr1.
Qed.

Lemma fix_dstoch A : pos A -> rownorm A = A -> colnorm A = A -> dstoch A.
Proof.
move=> A0 Er Ec; split; first by move=> i j; exact: ltW.
- by rewrite -Er; exact: rownorm_sum.
- by rewrite -Ec; exact: colnorm_sum.
Qed.

(** ** Symmetries *)

Lemma rownorm_tr A : rownorm A^T = (colnorm A)^T.
Proof.
apply/matrixP => i j; rewrite !mxE; congr (_ / _).
by apply: eq_bigr => k _; rewrite mxE.
Qed.

Lemma colnorm_tr A : colnorm A^T = (rownorm A)^T.
Proof.
apply/matrixP => i j; rewrite !mxE; congr (_ / _).
by apply: eq_bigr => k _; rewrite mxE.
Qed.

(** Transpose duality: the two orders are the same function up to transposition, for every number of iterations. *)
Lemma sk_transpose A k : iter k sk_rows_last A^T = (iter k sk A)^T.
Proof.
elim: k => [//|k IH] /=.
by rewrite IH /sk_rows_last /sk colnorm_tr rownorm_tr.
Qed.

(** Scaling the rows by d changes nothing after a row step: constants added to a row of the logits have no effect. *)
Lemma rownorm_scale A (d : 'I_n -> R) : (forall i, d i != 0) ->
  rownorm (\matrix_(i, j) (d i * A i j)) = rownorm A.
Proof.
move=> d0; apply/matrixP => i j; rewrite !mxE.
under eq_bigr => k _ do rewrite mxE.
by rewrite -mulr_sumr -mulf_div divff ?mul1r.
Qed.

Lemma colnorm_scale A (d : 'I_n -> R) : (forall j, d j != 0) ->
  colnorm (\matrix_(i, j) (A i j * d j)) = colnorm A.
Proof.
move=> d0; apply/matrixP => i j; rewrite !mxE.
under eq_bigr => k _ do rewrite mxE.
by rewrite -mulr_suml -mulf_div divff ?mulr1.
Qed.

(** Permuting the streams permutes the result. *)
Definition permute (s t : 'S_n) A : 'M[R]_n := \matrix_(i, j) A (s i) (t j).

Lemma rownorm_permute s t A : rownorm (permute s t A) = permute s t (rownorm A).
Proof.
apply/matrixP => i j; rewrite !mxE; congr (_ / _).
under eq_bigr => k _ do rewrite mxE.
by rewrite [RHS](reindex_inj (@perm_inj _ t)).
Qed.

Lemma colnorm_permute s t A : colnorm (permute s t A) = permute s t (colnorm A).
Proof.
apply/matrixP => i j; rewrite !mxE; congr (_ / _).
under eq_bigr => k _ do rewrite mxE.
by rewrite [RHS](reindex_inj (@perm_inj _ s)).
Qed.

Lemma sk_permute s t A k : iter k sk (permute s t A) = permute s t (iter k sk A).
Proof.
elim: k => [//|k IH] /=.
by rewrite IH /sk rownorm_permute colnorm_permute.
Qed.

(** Cross ratios a_ij a_kl / (a_il a_kj) are invariants of the iteration: its limit, if any, has those of exp(logits). *)
Definition cross_eq A B := forall i j k l, A i j * A k l * (B i l * B k j) = A i l * A k j * (B i j * B k l).

Lemma cross_rownorm A : cross_eq A (rownorm A).
Proof. by move=> i j k l; rewrite !mxE; ring. Qed.

Lemma cross_colnorm A : cross_eq A (colnorm A).
Proof. by move=> i j k l; rewrite !mxE; ring. Qed.

(** ** The L1 error of the side that is not exact does not grow: one more full iteration (columns exact before) *)
Lemma l1_error_decreases A : pos A -> colst A ->
  \sum_j `|\sum_i (rownorm A) i j - 1| <= \sum_i `|\sum_j A i j - 1|.
Proof.
move=> A0 Ac.
have r0 i : 0 < \sum_k A i k by exact: rowsum_pos.
apply: (@le_trans _ _ (\sum_j \sum_i A i j * (`|\sum_k A i k - 1| / \sum_k A i k))).
  apply: ler_sum => j _; rewrite -[X in _ - X](Ac j) -sumrB.
  apply: le_trans (ler_norm_sum _ _ _) _; apply: ler_sum => i _.
  have -> : rownorm A i j - A i j = A i j * ((1 - \sum_k A i k) / \sum_k A i k).
    have := r0 i; rewrite mxE; set s := \sum_k A i k => s0.
    by rewrite mulrBl mul1r divff ?gt_eqF // mulrBr mulr1.
  rewrite normrM normf_div (ger0_norm (ltW (A0 i j))) (gtr0_norm (r0 i)).
  by rewrite distrC.
rewrite exchange_big /=; apply: ler_sum => i _.
by rewrite -mulr_suml mulrCA divff ?mulr1 // gt_eqF.
Qed.
End Sinkhorn.
