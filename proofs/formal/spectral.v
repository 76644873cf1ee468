(** Bounds on the spectral norm of non-negative matrices: Schur, Collatz-Wielandt, products, and the lower bound that shows
    why a truncated projection is not non-expansive. A squared norm is written [sqn x = sum_i x_i^2]; "norm of A at most g"
    is [gain A (g^2)]: no square root, no analysis. *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.
From birkhoff_formal Require Import stochastic.

Section Spectral.
Variable R : realFieldType.
Variable n : nat.
Implicit Types A B : 'M[R]_n.

Definition sqn (x : 'cV[R]_n) := \sum_i x i 0 ^+ 2.
Definition gain A (g : R) := forall x : 'cV[R]_n, sqn (A *m x) <= g * sqn x.

Lemma sqn_ge0 x : 0 <= sqn x.
Proof. by apply: sumr_ge0 => i _; exact: sqr_ge0. Qed.

(** ** Cauchy-Schwarz with weights: (sum w x)^2 <= (sum w) (sum w x^2) *)

Lemma square_of_difference (a b x y : R) :
  a * (b * y ^+ 2) + b * (a * x ^+ 2) - (a * x * (b * y) + a * x * (b * y)) = a * b * (x - y) ^+ 2.
Proof. by ring. Qed.

Lemma wcs (w x : 'I_n -> R) : (forall j, 0 <= w j) ->
  (\sum_j w j * x j) ^+ 2 <= (\sum_j w j) * (\sum_j w j * x j ^+ 2).
Proof.
move=> w0; rewrite -subr_ge0.
set S := \sum_j w j; set T := \sum_j w j * x j; set U := \sum_j _ * _ ^+ 2.
suff E : 2%:R * (S * U - T ^+ 2) = \sum_i \sum_j w i * w j * (x i - x j) ^+ 2.
  have : 0 <= 2%:R * (S * U - T ^+ 2).
    rewrite E; apply: sumr_ge0 => i _; apply: sumr_ge0 => j _.
    by rewrite mulr_ge0 ?sqr_ge0 // mulr_ge0.
  by rewrite pmulr_rge0 // ltr0n.
have e1 : S * U = \sum_i \sum_j w i * (w j * x j ^+ 2).
  by rewrite /S mulr_suml; apply: eq_bigr => i _; rewrite mulr_sumr.
have e2 : S * U = \sum_i \sum_j w j * (w i * x i ^+ 2).
  by rewrite e1 exchange_big.
have e3 : T ^+ 2 = \sum_i \sum_j (w i * x i) * (w j * x j).
  by rewrite expr2 {1}/T mulr_suml; apply: eq_bigr => i _; rewrite mulr_sumr.
rewrite mulrBr !mulr_natl mulr2n {1}e1 e2 e3 -big_split /= mulr2n -big_split /= -sumrB.
apply: eq_bigr => i _; rewrite -!big_split /= -!sumrB.
apply: eq_bigr => j _; exact: square_of_difference.
Qed.

(** ** The Schur test: row sums <= r and column sums <= c give |Ax|^2 <= r c |x|^2 *)

Lemma schur A (r c : R) (x : 'cV[R]_n) : nonneg A -> 0 <= r ->
  (forall i, \sum_j A i j <= r) -> (forall j, \sum_i A i j <= c) ->
  sqn (A *m x) <= r * c * sqn x.
Proof.
move=> A0 r0 Ar Ac; rewrite /sqn.
apply: (@le_trans _ _ (\sum_i r * (\sum_j A i j * x j 0 ^+ 2))).
  apply: ler_sum => i _; rewrite mxE; apply: le_trans (wcs _ _) _ => //.
  apply: ler_wpmul2r; last exact: Ar.
  by apply: sumr_ge0 => j _; rewrite mulr_ge0 ?sqr_ge0.
rewrite -mulr_sumr -mulrA; apply: ler_wpmul2l => //.
rewrite exchange_big /= mulr_sumr; apply: ler_sum => j _.
rewrite -mulr_suml; apply: ler_wpmul2r; [exact: sqr_ge0 | exact: Ac].
Qed.

(** The certificate uses it with outward rounded sums rh, ch: any numbers not below the exact sums will do. *)
Lemma certificate A rh ch : nonneg A -> 0 <= rh ->
  (forall i, \sum_j A i j <= rh) -> (forall j, \sum_i A i j <= ch) -> gain A (rh * ch).
Proof. by move=> A0 r0 Ar Ac x; exact: schur. Qed.

(** Doubly stochastic: norm at most 1. *)
Lemma dstoch_nonexpansive A (x : 'cV[R]_n) : dstoch A -> sqn (A *m x) <= sqn x.
Proof.
move=> [A0 Ar Ac]; have := @schur A 1 1 x A0 ler01.
by rewrite !mul1r; apply=> k; rewrite ?Ar ?Ac lexx.
Qed.

(** Sums at most 1 are enough (the two scaling steps of the rounding already give that). *)
Lemma substoch_nonexpansive A (x : 'cV[R]_n) : nonneg A ->
  (forall i, \sum_j A i j <= 1) -> (forall j, \sum_i A i j <= 1) -> sqn (A *m x) <= sqn x.
Proof. by move=> A0 Ar Ac; have := @schur A 1 1 x A0 ler01 Ar Ac; rewrite !mul1r. Qed.

(** ** Products: sums multiply, gains multiply *)

Definition sub A (r c : R) :=
  [/\ nonneg A, forall i, \sum_j A i j <= r & forall j, \sum_i A i j <= c].

Lemma sub_mul A B r c r' c' : 0 <= r' -> 0 <= c ->
  sub A r c -> sub B r' c' -> sub (A *m B) (r * r') (c * c').
Proof.
move=> r0 c0 [A0 Ar Ac] [B0 Br Bc]; split; first exact: nonneg_mul.
- move=> i; under eq_bigr => j _ do rewrite mxE.
  rewrite exchange_big /=; under eq_bigr => k _ do rewrite -mulr_sumr.
  apply: (@le_trans _ _ (\sum_k A i k * r')).
    by apply: ler_sum => k _; apply: ler_wpmul2l => //; apply: Br.
  by rewrite -mulr_suml; apply: ler_wpmul2r.
- move=> j; under eq_bigr => i _ do rewrite mxE.
  rewrite exchange_big /=; under eq_bigr => k _ do rewrite -mulr_suml.
  apply: (@le_trans _ _ (\sum_k c * B k j)).
    by apply: ler_sum => k _; apply: ler_wpmul2r => //; apply: Ac.
  by rewrite -mulr_sumr; apply: ler_wpmul2l.
Qed.

Lemma gain_mul A B g h : 0 <= g -> gain A g -> gain B h -> gain (A *m B) (g * h).
Proof.
move=> g0 HA HB x; rewrite -mulmxA; apply: le_trans (HA _) _.
by rewrite -mulrA; apply: ler_wpmul2l.
Qed.

(** Non-expansive at every layer: non-expansive at any depth. *)
Lemma gain_prod1 (L : seq 'M[R]_n) : (forall A, A \in L -> gain A 1) -> gain (foldr mulmx 1%:M L) 1.
Proof.
elim: L => [|A L IH] H /=; first by move=> x; rewrite mul1mx mul1r.
have gA : gain A 1 by apply: H; rewrite mem_head.
have gL : gain (foldr mulmx 1%:M L) 1 by apply: IH => B BL; apply: H; rewrite inE BL orbT.
by have := gain_mul ler01 gA gL; rewrite mulr1.
Qed.

(** The maximal row sum of a product of non-negative matrices is read off one chained mat-vec: A (B 1) are its row sums. *)
Lemma chained_row_sums A B i : \sum_j (A *m B) i j = \sum_k A i k * (\sum_j B k j).
Proof.
under eq_bigr => j _ do rewrite mxE.
by rewrite exchange_big /=; apply: eq_bigr => k _; rewrite mulr_sumr.
Qed.

Lemma chained_col_sums A B j : \sum_i (A *m B) i j = \sum_k (\sum_i A i k) * B k j.
Proof.
under eq_bigr => i _ do rewrite mxE.
by rewrite exchange_big /=; apply: eq_bigr => k _; rewrite mulr_suml.
Qed.

(** ** Row-stochastic matrices: norm at most sqrt(n), at any depth *)

Lemma rowst_norm A : nonneg A -> rowst A -> gain A n%:R.
Proof.
move=> A0 Ar x.
have Hr i : \sum_j A i j <= 1 by rewrite Ar.
have Hc j : \sum_i A i j <= n%:R.
  apply: (@le_trans _ _ (\sum_(i < n) 1)); last by rewrite sumr_const card_ord.
  by apply: ler_sum => i _; exact: rowst_le1.
by have := schur x A0 ler01 Hr Hc; rewrite mul1r.
Qed.

Lemma rowst_prod_norm (L : seq 'M[R]_n) :
  (forall A, A \in L -> nonneg A /\ rowst A) -> gain (foldr mulmx 1%:M L) n%:R.
Proof. by move=> H; have [P0 Pr] := rowst_prod H; exact: rowst_norm. Qed.

(** ** Collatz-Wielandt: any positive x with A^T (A x) <= lam x bounds the squared norm by lam *)

Lemma collatz A (x y : 'cV[R]_n) lam : nonneg A -> (forall j, 0 < x j 0) ->
  (forall j, \sum_i A i j * (A *m x) i 0 <= lam * x j 0) ->
  sqn (A *m y) <= lam * sqn y.
Proof.
move=> A0 x0 H; rewrite /sqn.
apply: (@le_trans _ _ (\sum_i (A *m x) i 0 * (\sum_j A i j * (y j 0 ^+ 2 / x j 0)))).
  apply: ler_sum => i _; rewrite mxE.
  have -> : \sum_j A i j * y j 0 = \sum_j (A i j * x j 0) * (y j 0 / x j 0).
    apply: eq_bigr => j _; rewrite -mulrA; congr (_ * _).
    by rewrite mulrCA divff ?mulr1 // gt_eqF.
  apply: le_trans (wcs _ _) _; first by move=> j; rewrite mulr_ge0 // ltW.
  rewrite mxE; apply: ler_wpmul2l.
    by apply: sumr_ge0 => j _; rewrite mulr_ge0 // ltW.
  apply: ler_sum => j _; rewrite -mulrA; apply: ler_wpmul2l => //.
  have x1 : x j 0 != 0 by rewrite gt_eqF.
  have -> : x j 0 * (y j 0 / x j 0) ^+ 2 = y j 0 ^+ 2 / x j 0; last exact: lexx.
    by move: (x j 0) (y j 0) x1 => p q p0; field.
rewrite mulr_sumr.
have -> : \sum_i (A *m x) i 0 * (\sum_j A i j * (y j 0 ^+ 2 / x j 0))
  = \sum_j (y j 0 ^+ 2 / x j 0) * (\sum_i A i j * (A *m x) i 0).
  under eq_bigr => i _ do rewrite mulr_sumr.
  rewrite exchange_big; apply: eq_bigr => j _; rewrite mulr_sumr.
  by apply: eq_bigr => i _; ring.
apply: ler_sum => j _.
apply: le_trans (ler_wpmul2l _ (H j)) _; first by rewrite divr_ge0 ?sqr_ge0 // ltW.
by rewrite mulrCA -mulrA [_^-1 * _]mulrC divff ?mulr1 ?lexx // gt_eqF.
Qed.

(** ** Lower bounds: with exact columns every row error shows in the norm *)

Lemma gain_lower A : colst A ->
  sqn (A *m const_mx 1) = n%:R + \sum_i (\sum_j A i j - 1) ^+ 2.
Proof.
move=> Ac; rewrite /sqn.
have E i : (A *m (const_mx 1 : 'cV[R]_n)) i 0 = \sum_j A i j.
  by rewrite mxE; apply: eq_bigr => j _; rewrite mxE mulr1.
under eq_bigr => i _ do rewrite E.
have S : \sum_i \sum_j A i j = n%:R.
  rewrite exchange_big /=; under eq_bigr => j _ do rewrite Ac.
  by rewrite sumr_const card_ord.
have -> : \sum_i (\sum_j A i j) ^+ 2 =
  \sum_i ((\sum_j A i j - 1) ^+ 2 + (2%:R * (\sum_j A i j) - 1)).
  by apply: eq_bigr => i _; ring.
rewrite big_split /= addrC; congr (_ + _).
rewrite sumrB -mulr_sumr S sumr_const card_ord; ring.
Qed.

(** So a column-stochastic matrix with any wrong row sum has norm strictly above 1: "norm <= 1" is false after truncation. *)
Lemma truncation_expands A i : colst A -> \sum_j A i j != 1 ->
  sqn (const_mx 1) < sqn (A *m const_mx 1).
Proof.
move=> Ac bad; rewrite gain_lower //.
have -> : sqn (const_mx 1) = n%:R.
  rewrite /sqn; under eq_bigr => k _ do rewrite mxE expr1n.
  by rewrite sumr_const card_ord.
rewrite ltr_addl (bigD1 i) //=; apply: ltr_spaddl; last by apply: sumr_ge0 => k _; exact: sqr_ge0.
by rewrite lt_neqAle sqr_ge0 andbT eq_sym sqrf_eq0 subr_eq0.
Qed.
End Spectral.
