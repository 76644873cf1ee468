(** Stochastic and doubly stochastic matrices over any ordered field: closure, permutations, convex combinations,
    conservation of the mean. No axiom is used; [check_axioms.v] prints the evidence. *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.

Section Stochastic.
Variable R : realFieldType.
Variable n : nat.
Implicit Types A B : 'M[R]_n.

Definition nonneg A := forall i j, 0 <= A i j.
Definition rowst A := forall i, \sum_j A i j = 1.
Definition colst A := forall j, \sum_i A i j = 1.
Definition dstoch A := [/\ nonneg A, rowst A & colst A].

(** ** Products *)

Lemma nonneg_mul A B : nonneg A -> nonneg B -> nonneg (A *m B).
Proof. by move=> A0 B0 i j; rewrite mxE; apply: sumr_ge0 => k _; exact: mulr_ge0. Qed.

Lemma rowst_mul A B : rowst A -> rowst B -> rowst (A *m B).
Proof.
move=> Ar Br i; under eq_bigr => j _ do rewrite mxE.
rewrite exchange_big /=; under eq_bigr => k _ do rewrite -mulr_sumr Br mulr1.
exact: Ar.
Qed.

Lemma colst_mul A B : colst A -> colst B -> colst (A *m B).
Proof.
move=> Ac Bc j; under eq_bigr => i _ do rewrite mxE.
rewrite exchange_big /=; under eq_bigr => k _ do rewrite -mulr_suml Ac mul1r.
exact: Bc.
Qed.

(** The set of doubly stochastic matrices is closed under products ... *)
Lemma dstoch_mul A B : dstoch A -> dstoch B -> dstoch (A *m B).
Proof.
move=> [A0 Ar Ac] [B0 Br Bc].
by split; [exact: nonneg_mul | exact: rowst_mul | exact: colst_mul].
Qed.

(** ... holds the identity ... *)
Lemma nonneg1 : nonneg 1%:M.
Proof. by move=> i j; rewrite mxE; case: eqP => _; rewrite ?ler01 ?lexx. Qed.

Lemma rowst1 : rowst 1%:M.
Proof.
move=> i; rewrite (bigD1 i) //= mxE eqxx big1 ?addr0 // => j ji.
by rewrite mxE eq_sym (negbTE ji).
Qed.

Lemma colst1 : colst 1%:M.
Proof.
move=> i; rewrite (bigD1 i) //= mxE eqxx big1 ?addr0 // => j ji.
by rewrite mxE (negbTE ji).
Qed.

Lemma dstoch1 : dstoch 1%:M.
Proof. by split; [exact: nonneg1 | exact: rowst1 | exact: colst1]. Qed.

(** ... and so holds the product of a network of any depth. *)
Lemma dstoch_prod (L : seq 'M[R]_n) :
  (forall A, A \in L -> dstoch A) -> dstoch (foldr mulmx 1%:M L).
Proof.
elim: L => [|A L IH] H /=; first exact: dstoch1.
apply: dstoch_mul; first by apply: H; rewrite mem_head.
by apply: IH => B BL; apply: H; rewrite inE BL orbT.
Qed.

(** Row-stochastic matrices alone are closed too: this is what rows-last truncation gives at any depth. *)
Lemma rowst_prod (L : seq 'M[R]_n) :
  (forall A, A \in L -> nonneg A /\ rowst A) ->
  nonneg (foldr mulmx 1%:M L) /\ rowst (foldr mulmx 1%:M L).
Proof.
elim: L => [|A L IH] H /=; first by split; [exact: nonneg1 | exact: rowst1].
have [A0 Ar] : nonneg A /\ rowst A by apply: H; rewrite mem_head.
have [P0 Pr] : nonneg (foldr mulmx 1%:M L) /\ rowst (foldr mulmx 1%:M L).
  by apply: IH => B BL; apply: H; rewrite inE BL orbT.
by split; [exact: nonneg_mul | exact: rowst_mul].
Qed.

(** Entries of a row-stochastic matrix lie in [0, 1]. *)
Lemma rowst_le1 A i j : nonneg A -> rowst A -> A i j <= 1.
Proof.
move=> A0 Ar; rewrite -(Ar i) (bigD1 j) //= ler_addl.
by apply: sumr_ge0 => k _; exact: A0.
Qed.

(** ** Transposition *)

Lemma dstoch_tr A : dstoch A -> dstoch A^T.
Proof.
move=> [A0 Ar Ac]; split.
- by move=> i j; rewrite mxE.
- by move=> i; under eq_bigr => j _ do rewrite mxE; exact: Ac.
- by move=> j; under eq_bigr => i _ do rewrite mxE; exact: Ar.
Qed.

(** ** What the two marginals mean for a state x (one column per channel) *)

(** Columns exact: the total over the streams, hence the mean, is conserved. *)
Lemma colst_mean A (x : 'cV[R]_n) : colst A -> \sum_i (A *m x) i 0 = \sum_i x i 0.
Proof.
move=> Ac; under eq_bigr => i _ do rewrite mxE.
by rewrite exchange_big /=; apply: eq_bigr => j _; rewrite -mulr_suml Ac mul1r.
Qed.

(** Rows exact: equal streams stay equal. *)
Lemma rowst_const A (c : R) : rowst A -> A *m const_mx c = const_mx c :> 'cV[R]_n.
Proof.
move=> Ar; apply/matrixP => i k; rewrite !mxE.
under eq_bigr => j _ do rewrite mxE.
by rewrite -mulr_suml Ar mul1r.
Qed.

(** Rows exact: no output stream leaves the range of the input streams. *)
Lemma rowst_range A (x : 'cV[R]_n) lo hi i : nonneg A -> rowst A ->
  (forall j, lo <= x j 0 <= hi) -> lo <= (A *m x) i 0 <= hi.
Proof.
move=> A0 Ar H; rewrite mxE.
have El : lo = \sum_j A i j * lo by rewrite -mulr_suml Ar mul1r.
have Eh : hi = \sum_j A i j * hi by rewrite -mulr_suml Ar mul1r.
apply/andP; split.
- by rewrite [X in X <= _]El; apply: ler_sum => j _; apply: ler_wpmul2l => //; case/andP: (H j).
- by rewrite [X in _ <= X]Eh; apply: ler_sum => j _; apply: ler_wpmul2l => //; case/andP: (H j).
Qed.

(** ** Permutations and convex combinations *)

Lemma dstoch_perm (s : 'S_n) : dstoch (perm_mx s : 'M[R]_n).
Proof.
split.
- by move=> i j; rewrite !mxE; case: eqP => _; rewrite ?ler01 ?lexx.
- move=> i; rewrite (bigD1 (s i)) //= !mxE eqxx big1 ?addr0 // => j ji.
  by rewrite !mxE eq_sym (negbTE ji).
- move=> j; rewrite (bigD1 ((s^-1)%g j)) //= !mxE permKV eqxx big1 ?addr0 // => i ij.
  rewrite !mxE; case: eqP => // e; by rewrite -e permK eqxx in ij.
Qed.

Lemma dstoch_convex (I : finType) (w : I -> R) (A : I -> 'M[R]_n) :
  (forall t, 0 <= w t) -> \sum_t w t = 1 -> (forall t, dstoch (A t)) ->
  dstoch (\sum_t w t *: A t).
Proof.
move=> w0 w1 HA; split.
- move=> i j; rewrite summxE; apply: sumr_ge0 => t _; rewrite mxE.
  by apply: mulr_ge0 => //; case: (HA t).
- move=> i; under eq_bigr => j _ do rewrite summxE.
  rewrite exchange_big -[RHS]w1; apply: eq_bigr => t _.
  under eq_bigr => j _ do rewrite mxE.
  by rewrite -mulr_sumr; case: (HA t) => _ -> _; rewrite mulr1.
- move=> j; under eq_bigr => i _ do rewrite summxE.
  rewrite exchange_big -[RHS]w1; apply: eq_bigr => t _.
  under eq_bigr => i _ do rewrite mxE.
  by rewrite -mulr_sumr; case: (HA t) => _ _ ->; rewrite mulr1.
Qed.

(** One step of the Birkhoff-von Neumann decomposition: subtracting a permutation with a weight that no entry on it falls
    below, and rescaling, leaves a doubly stochastic matrix. *)
Lemma bvn_step A (s : 'S_n) (w : R) : dstoch A -> w < 1 -> 0 <= w -> (forall i, w <= A i (s i)) ->
  dstoch ((1 - w)^-1 *: (A - w *: perm_mx s)).
Proof.
move=> [A0 Ar Ac] w1 w0 H.
have d0 : 0 < 1 - w by rewrite subr_gt0.
have d1 : 1 - w != 0 by rewrite gt_eqF.
have [_ Pr Pc] := dstoch_perm s.
split.
- move=> i j; rewrite !mxE mulr_ge0 ?invr_ge0 ?(ltW d0) //.
  by case: eqP => [<-|_]; rewrite ?mulr1 ?mulr0 ?subr0 ?subr_ge0.
- move=> i; under eq_bigr => j _ do rewrite mxE.
  rewrite -mulr_sumr; under eq_bigr => j _ do rewrite mxE [X in _ + X]mxE [X in - X]mxE.
  by rewrite sumrB Ar -mulr_sumr Pr mulr1 mulVf.
- move=> j; under eq_bigr => i _ do rewrite mxE.
  rewrite -mulr_sumr; under eq_bigr => i _ do rewrite mxE [X in _ + X]mxE [X in - X]mxE.
  by rewrite sumrB Ac -mulr_sumr Pc mulr1 mulVf.
Qed.
End Stochastic.

(** A 1 x 1 stochastic matrix is exactly 1: with one stream the residual path is untouched. *)
Lemma rowst_n1 (R : realFieldType) (A : 'M[R]_1) : rowst A -> A = 1%:M.
Proof.
move=> Ar; apply/matrixP => i j; rewrite !ord1 mxE eqxx -(Ar 0).
by rewrite big_ord_recl big_ord0 addr0.
Qed.
