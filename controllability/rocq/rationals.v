(** Numbers of one instance: exact rationals, evaluated by the kernel's virtual machine. Vectors are lists. *)

From Coq Require Import QArith Qabs List Bool.
Open Scope Q_scope.

Fixpoint zip (f : Q -> Q -> Q) (x y : list Q) : list Q :=
  match x, y with a :: x, b :: y => Qred (f a b) :: zip f x y | _, _ => nil end.
Definition add := zip Qplus.
Definition times := zip Qmult.
Definition scale (c : Q) : list Q -> list Q := map (Qmult c).
Fixpoint dot (x y : list Q) : Q := match x, y with a :: x, b :: y => Qred (a * b + dot x y) | _, _ => 0 end.
Definition apply (W : list (list Q)) (x : list Q) : list Q := map (fun row => dot row x) W.
Definition relu (x : Q) : Q := if Qle_bool 0 x then x else 0.
Definition relu2 (x : Q) : Q := relu x * relu x.
Definition identity (x : Q) : Q := x.
Fixpoint polynomial (c : list Q) (x : Q) : Q := match c with nil => 0 | a :: c => Qred (a + polynomial c x * x) end.

(** Every entry within [bound], and as many entries. *)
Fixpoint within (bound : Q) (x y : list Q) : bool :=
  match x, y with
  | nil, nil => true
  | a :: x, b :: y => Qle_bool (Qabs (a - b)) bound && within bound x y
  | _, _ => false
  end.
Theorem within_bound bound x y : within bound x y = true -> Forall2 (fun a b => Qabs (a - b) <= bound) x y.
Proof.
  revert y; induction x as [| a x IH]; intros [| b y]; simpl; try discriminate; auto.
  rewrite andb_true_iff, Qle_bool_iff; intros [A B]; auto.
Qed.

(** Farkas: [l] combines the rows of A to a row without negative entries and q to a number that is not positive, not both zero. *)
Fixpoint combined (l : list Q) (A : list (list Q)) (n : nat) : list Q :=
  match l, A with c :: l, row :: A => zip Qplus (scale c row) (combined l A n) | _, _ => repeat 0 n end.
Definition farkas (A : list (list Q)) (q l : list Q) (n : nat) : bool :=
  let row := combined l A n in
  Nat.eqb (length l) (length A) && Nat.eqb (length q) (length A) && forallb (fun r => Nat.eqb (length r) n) A
  && forallb (Qle_bool 0) row && Qle_bool (dot l q) 0
  && (existsb (fun a => negb (Qle_bool a 0)) row || negb (Qle_bool 0 (dot l q))).

Lemma dot_zip x y s : length x = length y -> dot (zip Qplus x y) s == dot x s + dot y s.
Proof.
  revert y s; induction x as [| a x IH]; intros [| b y] s; simpl; try discriminate; [destruct s; reflexivity |].
  intro L; destruct s as [| c s]; [reflexivity |].
  change (Qred (Qred (a + b) * c + dot (zip Qplus x y) s) == Qred (a * c + dot x s) + Qred (b * c + dot y s)).
  rewrite !Qred_correct, IH by congruence; ring.
Qed.
Lemma dot_scale c x s : dot (scale c x) s == c * dot x s.
Proof.
  revert s; induction x as [| a x IH]; intros [| b s]; try (simpl; ring).
  change (Qred (c * a * b + dot (scale c x) s) == c * Qred (a * b + dot x s)); rewrite !Qred_correct, IH; ring.
Qed.
Lemma zip_length x y : length x = length y -> length (zip Qplus x y) = length y.
Proof. revert y; induction x as [| a x IH]; intros [| b y]; simpl; try discriminate; auto. Qed.
Lemma dot_zero n s : dot (repeat 0 n) s == 0.
Proof.
  revert s; induction n as [| n IH]; intros [| b s]; try reflexivity.
  change (Qred (0 * b + dot (repeat 0 n) s) == 0); rewrite Qred_correct, IH; ring.
Qed.
Lemma combined_length l A n : forallb (fun r => Nat.eqb (length r) n) A = true -> length (combined l A n) = n.
Proof.
  revert A; induction l as [| c l IH]; intros [| row A]; simpl; intros; try apply repeat_length.
  rewrite andb_true_iff, Nat.eqb_eq in H; destruct H as [H B].
  rewrite zip_length; [auto |]. unfold scale; rewrite map_length, IH; auto.
Qed.
Lemma combined_dot l A n q s : forallb (fun r => Nat.eqb (length r) n) A = true ->
  Forall2 (fun row b => dot row s == b) A q -> length l = length A -> dot (combined l A n) s == dot l q.
Proof.
  intros S E; revert l; induction E as [| row b A q D E IH]; intros [| c l]; try discriminate; intro L.
  - apply dot_zero.
  - change (dot (zip Qplus (scale c row) (combined l A n)) s == Qred (c * b + dot l q)). injection L as L. simpl in S; rewrite andb_true_iff, Nat.eqb_eq in S; destruct S as [S B].
    rewrite Qred_correct, dot_zip, dot_scale, D, IH; auto; [reflexivity |].
    unfold scale; rewrite map_length, combined_length; auto.
Qed.
Lemma dot_sign row s : forallb (Qle_bool 0) row = true -> Forall (Qlt 0) s -> length row = length s ->
  0 <= dot row s /\ (existsb (fun a => negb (Qle_bool a 0)) row = true -> 0 < dot row s).
Proof.
  intros P Z; revert row P; induction Z as [| b s B Z IH]; intros [| a row]; try discriminate; intros P L.
  - split; [apply Qle_refl | discriminate].
  - change (0 <= Qred (a * b + dot row s) /\
      (negb (Qle_bool a 0) || existsb (fun a => negb (Qle_bool a 0)) row = true -> 0 < Qred (a * b + dot row s))).
    simpl in P; rewrite andb_true_iff, Qle_bool_iff in P; destruct P as [A P]; injection L as L.
    destruct (IH row P L) as [U V]; rewrite Qred_correct.
    assert (0 <= a * b) as M by (apply Qmult_le_0_compat; auto; now apply Qlt_le_weak).
    split; [now apply (Qplus_le_compat 0 _ 0) |].
    rewrite orb_true_iff, negb_true_iff; intros [N | N].
    + assert (0 < a) as C. { apply Qnot_le_lt; intro C; apply Qle_bool_iff in C; congruence. }
      setoid_replace 0 with (0 + 0) by ring; apply Qplus_lt_le_compat; auto.
      setoid_replace 0 with (0 * b) by ring; now apply Qmult_lt_compat_r.
    + setoid_replace 0 with (0 + 0) by ring; rewrite (Qplus_comm (a * b)); apply Qplus_lt_le_compat; auto.
Qed.
Theorem no_scale A q l n : farkas A q l n = true ->
  ~ exists s, length s = n /\ Forall (Qlt 0) s /\ Forall2 (fun row b => dot row s == b) A q.
Proof.
  unfold farkas; rewrite !andb_true_iff, !Nat.eqb_eq, orb_true_iff, negb_true_iff, Qle_bool_iff.
  intros (((((L & K) & S) & P) & Q) & D) (s & M & Z & E).
  pose proof (combined_dot l A n q s S E L) as X.
  destruct (dot_sign (combined l A n) s P Z) as [U V]; [rewrite combined_length; auto |].
  rewrite X in *. destruct D as [D | D]; [apply (Qlt_not_le _ _ (V D) Q) |].
  rewrite <- Qle_bool_iff in U; congruence.
Qed.
