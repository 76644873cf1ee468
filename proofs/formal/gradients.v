(** Gradients. One normalisation y = m / s: its exact difference quotient and the adjoint of its derivative. The implicit
    vector-Jacobian product at a doubly stochastic matrix. Both are finite algebra: no limit is taken. *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.
From birkhoff_formal Require Import stochastic.

Section Normalisation.
Variable R : realFieldType.
Variable n : nat.
Implicit Types m h g : 'I_n -> R.

Definition total m := \sum_i m i.
Definition normalised m i := m i / total m.

(** The quotient (y(m + t h) - y(m)) / t equals (h_i - y_i sum h) / (s + t sum h) exactly; at t = 0 this is the derivative. *)
Lemma normalised_difference m h t i : total m != 0 -> total (fun k => m k + t * h k) != 0 ->
  normalised (fun k => m k + t * h k) i - normalised m i
  = t * ((h i - normalised m i * total h) / total (fun k => m k + t * h k)).
Proof.
rewrite /normalised; have -> : total (fun k => m k + t * h k) = total m + t * total h.
  by rewrite /total big_split /= -mulr_sumr.
by move=> s0 s1; field; rewrite s0 s1.
Qed.

Definition tangent m h i := (h i - normalised m i * total h) / total m.
Definition adjoint m g j := (g j - \sum_i g i * normalised m i) / total m.

(** The backward step dm = (dy - sum(dy y)) / s is the adjoint of the derivative. *)
Lemma normalised_adjoint m g h : \sum_i g i * tangent m h i = \sum_j adjoint m g j * h j.
Proof.
rewrite /tangent /adjoint.
have -> : \sum_i g i * ((h i - normalised m i * total h) / total m)
  = (\sum_i g i * h i - (\sum_i g i * normalised m i) * total h) / total m.
  rewrite mulrBl mulr_suml mulr_suml mulr_suml -sumrB; apply: eq_bigr => i _; ring.
have -> : \sum_j (g j - \sum_i g i * normalised m i) / total m * h j
  = (\sum_j g j * h j - (\sum_i g i * normalised m i) * total h) / total m.
  rewrite mulrBl /total [in RHS]mulr_sumr !mulr_suml -sumrB; apply: eq_bigr => i _; ring.
by [].
Qed.

(** The gradient is orthogonal to m: scaling m does not change y. *)
Lemma normalised_adjoint_orthogonal m g : total m != 0 -> \sum_j adjoint m g j * m j = 0.
Proof.
move=> s0; rewrite -normalised_adjoint big1 // => i _.
rewrite /tangent /normalised; have -> : m i - m i / total m * total m = 0 by field.
by rewrite mul0r mulr0.
Qed.
End Normalisation.

Section Implicit.
Variable R : realFieldType.
Variable n : nat.
Variable P : 'M[R]_n.
Hypothesis P_rows : rowst P.
Hypothesis P_cols : colst P.
Implicit Types G X : 'M[R]_n.
Implicit Types lam mu f g : 'I_n -> R.

Definition dot (A B : 'M[R]_n) := \sum_i \sum_j A i j * B i j.

(** A tangent of the scaling at P: logits move by X, the potentials by f and g. *)
Definition move_plan X f g : 'M[R]_n := \matrix_(i, j) (P i j * (X i j + f i + g j)).
Definition keeps_marginals (D : 'M[R]_n) := (forall i, \sum_j D i j = 0) /\ (forall j, \sum_i D i j = 0).

(** The vector-Jacobian product of the converged projection. *)
Definition implicit_vjp G lam mu : 'M[R]_n := \matrix_(i, j) (P i j * (G i j - lam i - mu j)).

(** lam and mu solve the linear system [[I, P], [P^T, I]] (lam, mu) = (rowsums(P.G), colsums(P.G)). *)
Definition solves G lam mu :=
  (forall i, lam i + \sum_j P i j * mu j = \sum_j P i j * G i j) /\
  (forall j, mu j + \sum_i P i j * lam i = \sum_i P i j * G i j).

Lemma implicit_rows G lam mu i : solves G lam mu -> \sum_j implicit_vjp G lam mu i j = 0.
Proof.
move=> [Hr _]; under eq_bigr => j _ do rewrite mxE !mulrBr.
by rewrite !sumrB -mulr_suml P_rows mul1r -(Hr i) addrAC addrK subrr.
Qed.

Lemma implicit_cols G lam mu j : solves G lam mu -> \sum_i implicit_vjp G lam mu i j = 0.
Proof.
move=> [_ Hc]; under eq_bigr => i _ do rewrite mxE !mulrBr.
by rewrite !sumrB -mulr_suml P_cols mul1r -(Hc j) addrK subrr.
Qed.

Lemma dot_marginals (D : 'M[R]_n) G lam mu : keeps_marginals D ->
  dot (\matrix_(i, j) (G i j - lam i - mu j)) D = dot G D.
Proof.
move=> [Dr Dc]; rewrite /dot.
under eq_bigr => i _ do (under eq_bigr => j _ do rewrite mxE !mulrBl).
under eq_bigr => i _ do rewrite !sumrB -mulr_sumr Dr mulr0 subr0.
rewrite sumrB [X in _ - X](_ : _ = 0) ?subr0 // exchange_big /=.
by apply: big1 => j _; rewrite -mulr_sumr Dc mulr0.
Qed.

(** Correctness: for every tangent that keeps the marginals, <G, dP> = <X_bar, dX>. *)
Lemma implicit_vjp_correct G X f g lam mu : solves G lam mu -> keeps_marginals (move_plan X f g) ->
  dot G (move_plan X f g) = dot (implicit_vjp G lam mu) X.
Proof.
move=> S K; rewrite -(dot_marginals G lam mu K) /dot.
have -> : \sum_i \sum_j (\matrix_(i, j) (G i j - lam i - mu j)) i j * move_plan X f g i j
  = \sum_i \sum_j (implicit_vjp G lam mu i j * X i j
      + (implicit_vjp G lam mu i j * f i + implicit_vjp G lam mu i j * g j)).
  by apply: eq_bigr => i _; apply: eq_bigr => j _; rewrite !mxE; ring.
under eq_bigr => i _ do rewrite big_split /=.
rewrite big_split /= -[RHS]addr0; congr (_ + _).
under eq_bigr => i _ do rewrite big_split /= -mulr_suml implicit_rows // mul0r add0r.
by rewrite exchange_big /=; apply: big1 => j _; rewrite -mulr_suml implicit_cols // mul0r.
Qed.

(** The system is consistent: both right-hand sides hold the same total. *)
Lemma implicit_consistent G : \sum_i \sum_j P i j * G i j = \sum_j \sum_i P i j * G i j.
Proof. by rewrite exchange_big. Qed.

(** Eliminating lam leaves the n x n system (I - P^T P) mu = colsums - P^T rowsums that the code solves. *)
Lemma implicit_schur G lam mu :
  (forall i, lam i = \sum_j P i j * G i j - \sum_j P i j * mu j) ->
  (forall j, mu j - \sum_i P i j * (\sum_k P i k * mu k)
     = \sum_i P i j * G i j - \sum_i P i j * (\sum_k P i k * G i k)) ->
  solves G lam mu.
Proof.
move=> Hl Hm; split=> [i|j]; first by rewrite Hl subrK.
under [X in _ + X]eq_bigr => i _ do rewrite Hl mulrBr.
by rewrite sumrB addrCA Hm addrC subrK.
Qed.
End Implicit.
