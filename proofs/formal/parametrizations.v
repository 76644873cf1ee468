(** Maps that are doubly stochastic by construction: squared orthogonal matrices, circulants, Kronecker-type blocks, the
    2 x 2 closed form. *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.
From birkhoff_formal Require Import stochastic spectral.

Section Orthogonal.
Variable R : realFieldType.
Variable n : nat.
Implicit Types Q : 'M[R]_n.

Definition orthogonal Q := Q *m Q^T = 1%:M.
Definition entrywise_square Q : 'M[R]_n := \matrix_(i, j) (Q i j ^+ 2).

(** Entrywise squares of an orthogonal matrix (Orthostochastic). *)
Lemma orthostochastic Q : orthogonal Q -> dstoch (entrywise_square Q).
Proof.
move=> H; have H' : Q^T *m Q = 1%:M by exact: mulmx1C.
split; first by move=> i j; rewrite mxE sqr_ge0.
- move=> i; under eq_bigr => j _ do rewrite mxE.
  have <- : (Q *m Q^T) i i = 1 by rewrite H mxE eqxx.
  by rewrite mxE; apply: eq_bigr => j _; rewrite mxE expr2.
- move=> j; under eq_bigr => i _ do rewrite mxE.
  have <- : (Q^T *m Q) j j = 1 by rewrite H' mxE eqxx.
  by rewrite mxE; apply: eq_bigr => i _; rewrite mxE expr2.
Qed.

(** An orthogonal matrix preserves every norm (Cayley). *)
Lemma orthogonal_isometry Q (x : 'cV[R]_n) : orthogonal Q -> sqn (Q *m x) = sqn x.
Proof.
move=> H; have H' : Q^T *m Q = 1%:M by exact: mulmx1C.
have E (y : 'cV[R]_n) : sqn y = (y^T *m y) 0 0.
  by rewrite /sqn mxE; apply: eq_bigr => i _; rewrite mxE expr2.
by rewrite !E trmx_mul -mulmxA [Q^T *m _]mulmxA H' mul1mx.
Qed.
End Orthogonal.

Section Circulant.
Variable R : realFieldType.
Variable n : nat.
Variable w : 'I_n.+1 -> R.
Hypothesis w0 : forall k, 0 <= w k.
Hypothesis w1 : \sum_k w k = 1.

(** Weights on the cyclic shifts: row i holds w, shifted by i (Circulant). *)
Definition circulant : 'M[R]_n.+1 := \matrix_(i, j) w (j - i).

Lemma circulant_dstoch : dstoch circulant.
Proof.
split; first by move=> i j; rewrite mxE.
- move=> i; under eq_bigr => j _ do rewrite mxE.
  rewrite -[RHS]w1 [RHS](reindex_inj (h := fun j : 'I_n.+1 => j - i)) //; exact: addIr.
- move=> j; under eq_bigr => i _ do rewrite mxE.
  rewrite -[RHS]w1 [RHS](reindex_inj (h := fun i : 'I_n.+1 => j - i)) //.
  by move=> a b /addrI /oppr_inj.
Qed.
End Circulant.

Section Two.
Variable R : realFieldType.
Implicit Types A : 'M[R]_2.

(** A 2 x 2 doubly stochastic matrix has one degree of freedom ... *)
Lemma dstoch2 A : dstoch A -> [/\ A 1 1 = A 0 0, A 0 1 = 1 - A 0 0 & A 1 0 = 1 - A 0 0].
Proof.
move=> [_ Ar Ac].
have r0 : A 0 0 + A 0 1 = 1 by rewrite -(Ar 0) !big_ord_recl big_ord0 addr0; congr (_ + A _ _); exact/val_inj.
have c0 : A 0 0 + A 1 0 = 1 by rewrite -(Ac 0) !big_ord_recl big_ord0 addr0; congr (_ + A _ _); exact/val_inj.
have r1 : A 1 0 + A 1 1 = 1.
  by rewrite -(Ar 1) !big_ord_recl big_ord0 addr0; congr (_ + A _ _); exact/val_inj.
have e1 : A 0 1 = 1 - A 0 0 by rewrite -r0 addrC addKr.
have e2 : A 1 0 = 1 - A 0 0 by rewrite -c0 addrC addKr.
split=> //; move: r1; rewrite e2 => r1.
have -> : A 1 1 = (1 - A 0 0 + A 1 1) - (1 - A 0 0) by ring.
by rewrite r1; ring.
Qed.

(** ... which its cross ratio t^2 = p^2 / (1 - p)^2 determines: p = t / (1 + t), the closed form sigmoid(theta / 2). *)
Lemma two_closed_form (p t : R) : 0 <= p -> 0 <= t -> p < 1 -> p ^+ 2 = t ^+ 2 * (1 - p) ^+ 2 -> p = t / (1 + t).
Proof.
move=> p0 t0 p1 H.
have q0 : 0 <= 1 - p by rewrite subr_ge0 ltW.
have E : p = t * (1 - p).
  apply/eqP; rewrite -(eqr_expn2 (ltn0Sn 1)) ?mulr_ge0 //.
  by rewrite exprMn H.
have d : 1 + t != 0 by rewrite gt_eqF // ltr_paddr ?ltr01.
have F : p * (1 + t) = t by rewrite mulrDr mulr1 {1}E mulrBr mulr1 mulrC subrK.
by apply: (canRL (mulfK d)); exact: F.
Qed.
End Two.
