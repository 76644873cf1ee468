(** Floating-point sums in an abstract rounding model: an operation returns fl with x <= fl * (1 + u) and fl <= x * (1 + u)
    for x >= 0. IEEE round-to-nearest satisfies it away from underflow. Every order of summation is a binary tree. *)
From mathcomp Require Import all_ssreflect all_fingroup all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.TTheory.
Local Open Scope ring_scope.

Section FloatSum.
Variable R : realFieldType.
Variable u : R.
Hypothesis u0 : 0 <= u.
Variable fl : R -> R.
Hypothesis fl_lower : forall x, 0 <= x -> x <= fl x * (1 + u).
Hypothesis fl_upper : forall x, 0 <= x -> fl x <= x * (1 + u).

Inductive tree := Leaf of R | Node of tree & tree.

Fixpoint exact t := match t with Leaf a => a | Node s t => exact s + exact t end.
Fixpoint computed t := match t with Leaf a => a | Node s t => fl (computed s + computed t) end.
Fixpoint depth t := match t with Leaf _ => 0%N | Node s t => (maxn (depth s) (depth t)).+1 end.
Fixpoint terms_ge0 t := match t with Leaf a => 0 <= a | Node s t => terms_ge0 s && terms_ge0 t end.

Lemma onepu : 1 <= 1 + u. Proof. by rewrite ler_addl. Qed.
Lemma onepu_gt0 : 0 < 1 + u. Proof. exact: lt_le_trans ltr01 onepu. Qed.

Lemma pow_ge0 k : 0 <= (1 + u) ^+ k.
Proof. by rewrite exprn_ge0 // ltW // onepu_gt0. Qed.

Lemma pow_le k l : (k <= l)%N -> (1 + u) ^+ k <= (1 + u) ^+ l.
Proof. by move=> kl; rewrite ler_weexpn2l // onepu. Qed.

Lemma fl_ge0 x : 0 <= x -> 0 <= fl x.
Proof. by move=> x0; rewrite -(pmulr_lge0 _ onepu_gt0); exact: le_trans x0 (fl_lower x0). Qed.

Lemma computed_ge0 t : terms_ge0 t -> 0 <= computed t.
Proof. by elim: t => [a|s IHs t IHt] //= /andP[s0 t0]; rewrite fl_ge0 // addr_ge0 ?IHs ?IHt. Qed.

(** The certificate's step: the exact sum is at most the computed one times (1 + u)^depth, in any order. *)
Lemma float_sum_upper t : terms_ge0 t -> exact t <= computed t * (1 + u) ^+ depth t.
Proof.
elim: t => [a _|s IHs t IHt] /=; first by rewrite expr0 mulr1.
move=> /andP[s0 t0]; set d := maxn _ _.
have c0 : 0 <= computed s + computed t by rewrite addr_ge0 ?computed_ge0.
apply: (@le_trans _ _ ((computed s + computed t) * (1 + u) ^+ d)).
  rewrite mulrDl ler_add //.
  - apply: le_trans (IHs s0) _; apply: ler_wpmul2l; first exact: computed_ge0.
    by apply: pow_le; rewrite leq_maxl.
  - apply: le_trans (IHt t0) _; apply: ler_wpmul2l; first exact: computed_ge0.
    by apply: pow_le; rewrite leq_maxr.
by rewrite exprS mulrA; apply: ler_wpmul2r; [exact: pow_ge0 | exact: fl_lower].
Qed.

(** And the computed sum is at most the exact one times (1 + u)^depth. *)
Lemma float_sum_lower t : terms_ge0 t -> computed t <= exact t * (1 + u) ^+ depth t.
Proof.
elim: t => [a _|s IHs t IHt] /=; first by rewrite expr0 mulr1.
move=> /andP[s0 t0]; set d := maxn _ _.
have c0 : 0 <= computed s + computed t by rewrite addr_ge0 ?computed_ge0.
have e0 r : terms_ge0 r -> 0 <= exact r.
  by elim: r => [a|r1 I1 r2 I2] //= /andP[a b]; rewrite addr_ge0 ?I1 ?I2.
apply: le_trans (fl_upper c0) _; rewrite exprSr mulrA; apply: ler_wpmul2r; first exact: ltW onepu_gt0.
rewrite mulrDl ler_add //.
- apply: le_trans (IHs s0) _; apply: ler_wpmul2l; first exact: e0.
  by apply: pow_le; rewrite leq_maxl.
- apply: le_trans (IHt t0) _; apply: ler_wpmul2l; first exact: e0.
  by apply: pow_le; rewrite leq_maxr.
Qed.

(** ** A normalised side sums to 1 within (1 + u)^(m + 1): sum once in depth m, divide once *)

Section Normalised.
Variable n : nat.
Variable a : 'I_n -> R.
Hypothesis a0 : forall i, 0 <= a i.
Variable s : R.
Hypothesis s_gt0 : 0 < s.
Variable m : nat.
Hypothesis s_upper : \sum_i a i <= s * (1 + u) ^+ m.
Hypothesis s_lower : s <= (\sum_i a i) * (1 + u) ^+ m.

Lemma normalised_sum_upper : \sum_i fl (a i / s) <= (1 + u) ^+ m.+1.
Proof.
apply: (@le_trans _ _ (\sum_i (a i / s) * (1 + u))).
  by apply: ler_sum => i _; apply: fl_upper; rewrite divr_ge0 // ltW.
rewrite -mulr_suml -mulr_suml exprSr; apply: ler_wpmul2r; first exact: ltW onepu_gt0.
by rewrite ler_pdivr_mulr // mulrC.
Qed.

Lemma normalised_sum_lower : 1 <= (\sum_i fl (a i / s)) * (1 + u) ^+ m.+1.
Proof.
apply: (@le_trans _ _ ((\sum_i a i / s) * (1 + u) ^+ m)).
  by rewrite -mulr_suml mulrAC ler_pdivl_mulr // mul1r.
rewrite exprS mulrA; apply: ler_wpmul2r; first exact: pow_ge0.
rewrite mulr_suml; apply: ler_sum => i _; apply: fl_lower.
by rewrite divr_ge0 // ltW.
Qed.
End Normalised.

(** (1 + u)^k <= 1 + k u + (k u)^2 while k u <= 1: the bounds above are "k units of roundoff" up to second order. *)
Lemma pow_linear k : k%:R * u <= 1 -> (1 + u) ^+ k <= 1 + k%:R * u + (k%:R * u) ^+ 2.
Proof.
elim: k => [_|k IH H]; first by rewrite expr0 mul0r expr0n /= !addr0.
have ku : k%:R * u <= 1.
  by apply: le_trans H; apply: ler_wpmul2r => //; rewrite ler_nat.
have ku0 : 0 <= k%:R * u by rewrite mulr_ge0 ?ler0n.
rewrite exprSr; apply: le_trans (ler_wpmul2r (ltW onepu_gt0) (IH ku)) _.
rewrite -subr_ge0 -[k.+1]addn1 natrD.
have -> : 1 + (k%:R + 1) * u + ((k%:R + 1) * u) ^+ 2 - (1 + k%:R * u + (k%:R * u) ^+ 2) * (1 + u)
  = u * (k%:R * u * (1 - k%:R * u) + u) by ring.
rewrite mulr_ge0 // addr_ge0 // mulr_ge0 // subr_ge0 //.
Qed.
End FloatSum.
