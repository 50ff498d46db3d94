(** Context into weights: the theorems and the rules behind a patch.

    To be read beside the documentation of the rules. A *node* is a map with parameters, together with its side
    conditions, its patch, and the proof that the patch does what the rule says. A certificate builds a node of the whole
    block from the lemmas below; that the node computes the block, and that its patch is the stated one, is decided by the
    kernel's conversion. Axioms: those of the standard library's real numbers, and functional extensionality. *)

From Coq Require Import Reals Lra List FunctionalExtensionality FinFun.
Open Scope R_scope.
#[local] Obligation Tactic := idtac.

(** ** 1. Finite index sets, sums, vectors, matrices *)

(** An index set is a type with the list of its members, each once. The sizes of a certificate are such types. *)
Class Finite (I : Type) := {
  members : list I;
  every : forall i, In i members;
  once : NoDup members;
  same : forall i j : I, {i = j} + {i <> j} }.

Definition vec (I : Type) := I -> R.
Definition mat (O I : Type) := O -> I -> R.

Definition sum_over {I} (l : list I) (f : I -> R) : R := fold_right (fun i a => f i + a) 0 l.
Definition sum {I} `{Finite I} (f : I -> R) : R := sum_over members f.
Definition mean {I} `{Finite I} (f : I -> R) : R := sum f / INR (length members).
Definition zero {I} : vec I := fun _ => 0.
Definition ones {I} : vec I := fun _ => 1.
Definition dot {I} `{Finite I} (x y : vec I) : R := sum (fun i => x i * y i).
Definition apply {O I} `{Finite I} (W : mat O I) (x : vec I) : vec O := fun o => dot (W o) x.
Definition times {I} (x y : vec I) : vec I := fun i => x i * y i.
Definition scale {I} (c : R) (x : vec I) : vec I := fun i => c * x i.
Definition quotient {I} (x y : vec I) : vec I := fun i => x i / y i.
Definition map {I} (f : R -> R) (x : vec I) : vec I := fun i => f (x i).
Definition transpose {O I} (W : mat O I) : mat I O := fun i o => W o i.
Definition mean_square {I} `{Finite I} (x : vec I) : R := mean (fun i => x i * x i).

#[global] Program Instance Finite_unit : Finite unit := {| members := tt :: nil |}.
Next Obligation. intros []; simpl; auto. Qed.
Next Obligation. repeat constructor; auto. Qed.
Next Obligation. intros [] []; auto. Qed.

Lemma app_once {I} (l m : list I) : NoDup l -> NoDup m -> (forall i, In i l -> ~ In i m) -> NoDup (l ++ m).
Proof.
  intros N M D; induction N as [| i l A N IH]; simpl in *; auto. constructor.
  - rewrite in_app_iff; intros [B | B]; [auto | apply (D i); auto].
  - apply IH; auto.
Qed.
#[global] Instance Finite_sum {I J} `{Finite I} `{Finite J} : Finite (I + J).
Proof.
  refine {| members := List.map inl members ++ List.map inr members |}.
  - intros [i | j]; apply in_or_app; [left | right]; apply in_map, every.
  - apply app_once; try (apply Injective_map_NoDup; [intros a b E; now inversion E | apply once]).
    intros x A B; rewrite in_map_iff in *; destruct A as (a & <- & _), B as (b & E & _); discriminate.
  - decide equality; apply same.
Defined.
#[global] Instance Finite_product {I J} `{Finite I} `{Finite J} : Finite (I * J).
Proof.
  refine {| members := list_prod members members |}.
  - intros [i j]; apply in_prod; apply every.
  - induction (@once I _) as [| i l N D IH]; simpl; [constructor |]; apply app_once; auto.
    + apply Injective_map_NoDup; [intros a b E; now inversion E | apply once].
    + intros [a b] A B; rewrite in_map_iff in A; destruct A as (c & E & _); inversion E; subst.
      apply in_prod_iff in B; tauto.
  - decide equality; apply same.
Defined.

Section Sums.
Context {I : Type}.
Implicit Types (l : list I) (f g : I -> R).

Lemma over_ext l f g : (forall i, f i = g i) -> sum_over l f = sum_over l g.
Proof. intro E; induction l; simpl; [auto | rewrite E, IHl; auto]. Qed.
Lemma over_add l f g : sum_over l (fun i => f i + g i) = sum_over l f + sum_over l g.
Proof. induction l; simpl; [lra | rewrite IHl; lra]. Qed.
Lemma over_scale l c f : sum_over l (fun i => c * f i) = c * sum_over l f.
Proof. induction l; simpl; [lra | rewrite IHl; lra]. Qed.
Lemma over_nonneg l f : (forall i, 0 <= f i) -> 0 <= sum_over l f.
Proof. intro P; induction l; simpl; [lra | specialize (P a); lra]. Qed.
Lemma over_positive l f i : (forall i, 0 <= f i) -> In i l -> 0 < f i -> 0 < sum_over l f.
Proof.
  intros P; induction l; simpl; [tauto |]. intros [-> | L] Q.
  - pose proof (over_nonneg l f P); lra.
  - pose proof (P a); specialize (IHl L Q); lra.
Qed.
Lemma over_zero l f : (forall i, In i l -> f i = 0) -> sum_over l f = 0.
Proof. induction l; simpl; auto; intro E; rewrite E, IHl; auto; lra. Qed.
Lemma over_one l f j : NoDup l -> In j l -> (forall i, i <> j -> f i = 0) -> sum_over l f = f j.
Proof.
  intros N; induction N as [| a l A N IH]; simpl; [tauto |]. intros [-> | L] E.
  - rewrite over_zero; [lra |]. intros i B; apply E; intros ->; auto.
  - rewrite IH, E; auto; [lra |]. intros ->; auto.
Qed.
End Sums.

Lemma over_swap {I J} (l : list I) (m : list J) (f : I -> J -> R) :
  sum_over l (fun i => sum_over m (f i)) = sum_over m (fun j => sum_over l (fun i => f i j)).
Proof.
  induction l; simpl; [now rewrite over_zero |]. rewrite IHl, over_add; auto.
Qed.

Section Vectors.
Context {I : Type} `{Finite I}.
Implicit Types (f g : I -> R) (x y : vec I).

Lemma sum_ext f g : (forall i, f i = g i) -> sum f = sum g.
Proof. apply over_ext. Qed.
Lemma sum_add f g : sum (fun i => f i + g i) = sum f + sum g.
Proof. apply over_add. Qed.
Lemma sum_scale c f : sum (fun i => c * f i) = c * sum f.
Proof. apply over_scale. Qed.
Lemma mean_scale c f : mean (fun i => c * f i) = c * mean f.
Proof. unfold mean; rewrite sum_scale; unfold Rdiv; ring. Qed.
Lemma mean_add f g : mean (fun i => f i + g i) = mean f + mean g.
Proof. unfold mean; rewrite sum_add; unfold Rdiv; ring. Qed.
Lemma mean_ext f g : (forall i, f i = g i) -> mean f = mean g.
Proof. intro E; unfold mean; now rewrite (sum_ext f g E). Qed.
Lemma sum_one f j : (forall i, i <> j -> f i = 0) -> sum f = f j.
Proof. apply over_one; [apply once | apply every]. Qed.
Lemma size_nonneg : 0 <= INR (length (@members I _)).
Proof. apply pos_INR. Qed.
Lemma mean_nonneg f : (forall i, 0 <= f i) -> 0 <= mean f.
Proof.
  intro P; unfold mean; destruct (Req_dec (INR (length (@members I _))) 0) as [-> | N].
  - unfold Rdiv; rewrite Rinv_0; lra.
  - apply Rmult_le_pos; [now apply over_nonneg | left; apply Rinv_0_lt_compat; pose proof size_nonneg; lra].
Qed.
Lemma mean_square_nonneg x : 0 <= mean_square x.
Proof. apply mean_nonneg; intro; apply Rle_0_sqr. Qed.
Lemma mean_square_scale c x : mean_square (scale c x) = c * c * mean_square x.
Proof. unfold mean_square; rewrite <- mean_scale; apply mean_ext; intro; unfold scale; ring. Qed.

Lemma dot_self x : x <> zero -> dot x x <> 0.
Proof.
  intros N E; apply N; extensionality i; destruct (Req_dec (x i) 0) as [| P]; auto.
  assert (0 < dot x x); [| lra].
  apply over_positive with i; [intro; apply Rle_0_sqr | apply every | now apply Rsqr_pos_lt].
Qed.
Lemma zero_or_not x : x = zero \/ x <> zero.
Proof.
  destruct (Req_dec (dot x x) 0) as [E | N].
  - left; extensionality i; destruct (Req_dec (x i) 0) as [| P]; auto.
    assert (0 < dot x x); [| lra].
    apply over_positive with i; [intro; apply Rle_0_sqr | apply every | now apply Rsqr_pos_lt].
  - right; intros ->; apply N; apply over_zero; intros; apply Rmult_0_l.
Qed.
Lemma mean_square_positive x : x <> zero -> 0 < mean_square x.
Proof.
  intro N; apply Rdiv_lt_0_compat.
  - pose proof (over_nonneg members _ (fun i => Rle_0_sqr (x i))) as A; pose proof (dot_self x N) as B.
    change (0 <= dot x x) in A; change (0 < dot x x); lra.
  - apply lt_0_INR; destruct (members) as [| j l] eqn:L; simpl; [| apply PeanoNat.Nat.lt_0_succ].
    destruct N; extensionality i; pose proof (every i) as F; rewrite L in F; destruct F.
Qed.
Lemma dot_add_l x y z : dot (fun i => x i + y i) z = dot x z + dot y z.
Proof. unfold dot; rewrite <- sum_add; apply sum_ext; intro; ring. Qed.
Lemma dot_scale_l c x z : dot (fun i => c * x i) z = c * dot x z.
Proof. unfold dot; rewrite <- sum_scale; apply sum_ext; intro; ring. Qed.
Lemma dot_sum_l {J} (l : list J) (F : J -> vec I) z :
  dot (fun i => sum_over l (fun j => F j i)) z = sum_over l (fun j => dot (F j) z).
Proof.
  unfold dot, sum; rewrite over_swap. apply over_ext; intro.
  rewrite Rmult_comm, <- over_scale. apply over_ext; intro; ring.
Qed.
End Vectors.

Lemma sum_swap {I J} `{Finite I} `{Finite J} (f : I -> J -> R) :
  sum (fun i => sum (f i)) = sum (fun j => sum (fun i => f i j)).
Proof. apply over_swap. Qed.
Lemma sum_zero {I} `{Finite I} (f : I -> R) : (forall i, f i = 0) -> sum f = 0.
Proof. intro; now apply over_zero. Qed.

(** What can be added and subtracted: numbers, vectors, one vector for each token, one for each chosen expert. *)
Class Space (Y : Type) := {
  add : Y -> Y -> Y;
  sub : Y -> Y -> Y;
  add_sub : forall a b, add a (sub b a) = b;
  add_comm : forall a b, add a b = add b a;
  add_assoc : forall a b c, add a (add b c) = add (add a b) c }.
#[global] Instance Space_R : Space R.
Proof. refine {| add := Rplus; sub := Rminus |}; intros; ring. Defined.
#[global] Instance Space_fun {I Y} `{Space Y} : Space (I -> Y).
Proof.
  refine {| add a b := fun i => add (a i) (b i); sub a b := fun i => sub (a i) (b i) |};
    intros; extensionality i; [apply add_sub | apply add_comm | apply add_assoc].
Defined.
Lemma add_swap {Y} `{Space Y} (a b c : Y) : add (add a c) b = add (add a b) c.
Proof. now rewrite <- add_assoc, (add_comm c), add_assoc. Qed.

(** ** 2. Controllability *)

(** Definition 1. On admissible (theta, z, z') some parameters give at z what theta gives at z'. *)
Definition input_controllable {P X Y} (f : P -> X -> Y) (D : P -> X -> X -> Prop) :=
  forall p z z', D p z z' -> exists p', f p' z = f p z'.
(** Definition 2. On admissible (phi, y, delta) some parameters add delta to the output at y. *)
Definition output_controllable {P X Y} `{Space Y} (g : P -> X -> Y) (D : P -> X -> Y -> Prop) :=
  forall p y delta, D p y delta -> exists p', g p' y = add (g p y) delta.

(** A leaf: the output is moved by any admissible delta. *)
Record leaf (P X Y : Type) `{Space Y} := Leaf {
  leaf_at : P -> X -> Y;
  leaf_can : P -> X -> Y -> Prop;
  leaf_move : P -> X -> Y -> P;
  leaf_ok : forall p x delta, leaf_can p x delta -> leaf_at (leaf_move p x delta) x = add (leaf_at p x) delta }.
(** The input side: what the target run had. *)
Record input (P X Y : Type) := Input {
  input_at : P -> X -> Y;
  input_can : P -> X -> X -> Prop;
  input_move : P -> X -> X -> P;
  input_ok : forall p z z', input_can p z z' -> input_at (input_move p z z') z = input_at p z' }.
(** The output side: any admissible output w. *)
Record output (P X Y : Type) := Output {
  output_at : P -> X -> Y;
  output_can : P -> X -> Y -> Prop;
  output_move : P -> X -> Y -> P;
  output_ok : forall p y w, output_can p y w -> output_at (output_move p y w) y = w }.
(** Through: the inner activations are those of the target run, and the output is any admissible w. *)
Record through (P A X Y : Type) := Through {
  through_at : P -> X -> Y;
  inside : P -> X -> A;
  through_can : P -> X -> X -> Y -> Prop;
  through_move : P -> X -> X -> Y -> P;
  inside_ok : forall p z z' w, through_can p z z' w -> inside (through_move p z z' w) z = inside p z';
  through_ok : forall p z z' w, through_can p z z' w -> through_at (through_move p z z' w) z = w }.
Arguments Leaf {P X Y _}. Arguments leaf_at {P X Y _}. Arguments leaf_can {P X Y _}.
Arguments leaf_move {P X Y _}. Arguments leaf_ok {P X Y _}.
Arguments Input {P X Y}. Arguments input_at {P X Y}. Arguments input_can {P X Y}.
Arguments input_move {P X Y}. Arguments input_ok {P X Y}.
Arguments Output {P X Y}. Arguments output_at {P X Y}. Arguments output_can {P X Y}.
Arguments output_move {P X Y}. Arguments output_ok {P X Y}.
Arguments Through {P A X Y}. Arguments through_at {P A X Y}. Arguments inside {P A X Y}.
Arguments through_can {P A X Y}. Arguments through_move {P A X Y}.
Arguments inside_ok {P A X Y}. Arguments through_ok {P A X Y}.

Theorem input_is_controllable {P X Y} (f : input P X Y) : input_controllable (input_at f) (input_can f).
Proof. intros p z z' C; exists (input_move f p z z'); now apply input_ok. Qed.
Theorem output_is_controllable {P X Y} `{Space Y} (g : output P X Y) :
  output_controllable (output_at g) (fun p y delta => output_can g p y (add (output_at g p y) delta)).
Proof. intros p y delta C; exists (output_move g p y (add (output_at g p y) delta)); now apply output_ok. Qed.

(** Theorem 1 as it is stated: no node, no explicit patch. *)
Theorem perfect_patch {P Q X Y Z} `{Space Z} (s : X -> Z) (f : P -> X -> Y) (g : Q -> Y -> Z) D E p q v v' :
  input_controllable f D -> output_controllable g E ->
  D p v v' -> E q (f p v') (sub (s v') (s v)) ->
  exists p' q', add (s v) (g q' (f p' v)) = add (s v') (g q (f p v')).
Proof.
  intros F G d e; destruct (F p v v' d) as [p' Fp], (G q (f p v') _ e) as [q' Gq].
  exists p', q'. now rewrite Fp, Gq, (add_comm (g _ _)), add_assoc, add_sub.
Qed.
(** Theorem 1b: g alone, at the source activation. *)
Theorem perfect_patch_1b {P Q X Y Z} `{Space Z} (s : X -> Z) (f : P -> X -> Y) (g : Q -> Y -> Z) E p q v v' :
  output_controllable g E ->
  E q (f p v) (sub (sub (add (s v') (g q (f p v'))) (s v)) (g q (f p v))) ->
  exists q', add (s v) (g q' (f p v)) = add (s v') (g q (f p v')).
Proof. intros G e; destruct (G _ _ _ e) as [q' E']; exists q'; now rewrite E', !add_sub. Qed.

(** ** 3. Leaves *)

Definition rows_of {E O I} (W : mat (E * O) I) (e : E) : mat O I := fun o => W (e, o).
Definition stacked {E O I} (W : E -> mat O I) : mat (E * O) I := fun eo => W (fst eo) (snd eo).
Definition transpose_each {E O I} (W : E -> mat O I) : E -> mat I O := fun e => transpose (W e).
(** How a parameter is stored: transposed, less an offset, experts stacked. *)
Record storage (P Q : Type) := Storage { held : P -> Q; store : Q -> P; held_store : forall q, held (store q) = q }.
Arguments Storage {P Q}. Arguments held {P Q}. Arguments store {P Q}. Arguments held_store {P Q}.
Definition plain {P} : storage P P := Storage (fun p => p) (fun p => p) (fun _ => eq_refl).
Definition turned {O I} : storage (mat I O) (mat O I) := Storage transpose transpose (fun _ => eq_refl).
Definition turned_each {E O I} : storage (E -> mat I O) (E -> mat O I) :=
  Storage transpose_each transpose_each (fun _ => eq_refl).
Definition stack {E O I} : storage (mat (E * O) I) (E -> mat O I) :=
  Storage rows_of stacked (fun _ => eq_refl).
Definition shifted {I} (c : R) (w : vec I) : vec I := fun i => w i + c.
Program Definition offset {I} (c : R) : storage (vec I) (vec I) := Storage (shifted c) (shifted (- c)) _.
Next Obligation. intros; extensionality i; unfold shifted; ring. Qed.
Program Definition then_held {A B C} (s : storage A B) (t : storage B C) : storage A C :=
  Storage (fun a => held t (held s a)) (fun c => store s (store t c)) _.
Next Obligation. intros; cbv beta; now rewrite !held_store. Qed.

(** What follows a map and commutes with adding: nothing, or a bias that stays. *)
Record translation (Y : Type) `{Space Y} := Translation {
  after : Y -> Y; after_add : forall y delta, after (add y delta) = add (after y) delta }.
Arguments Translation {Y _}. Arguments after {Y _}. Arguments after_add {Y _}.
Definition alone {Y} `{Space Y} : translation Y := Translation (fun y => y) (fun _ _ => eq_refl).
Program Definition plus {Y} `{Space Y} (b : Y) : translation Y := Translation (fun y => add y b) _.
Next Obligation. intros; apply add_swap. Qed.

Program Definition stored {P Q X Y} `{Space Y} (s : storage P Q) (l : leaf Q X Y) : leaf P X Y :=
  Leaf (fun p => leaf_at l (held s p)) (fun p => leaf_can l (held s p))
       (fun p x delta => store s (leaf_move l (held s p) x delta)) _.
Next Obligation. intros; cbv beta; rewrite held_store; now apply leaf_ok. Qed.

Definition rank_one {O I} (W : mat O I) (delta : vec O) (a : vec I) : mat O I := fun o i => W o i + delta o * a i.
Definition direction {I} `{Finite I} (x : vec I) : vec I := scale (/ dot x x) x.

Lemma rank_one_at {O I} `{Finite I} (W : mat O I) delta a x :
  apply (rank_one W delta a) x = fun o => apply W x o + delta o * dot a x.
Proof. extensionality o; unfold apply, rank_one; now rewrite dot_add_l, dot_scale_l. Qed.
Lemma direction_at {I} `{Finite I} (x : vec I) : x <> zero -> dot (direction x) x = 1.
Proof. intro N; unfold direction, scale; rewrite dot_scale_l; apply Rinv_l; now apply dot_self. Qed.

(** W x (+ b). The right vector may be any a with a . x = 1; the least norm has a = x/|x|^2. *)
Program Definition linear_by {O I} `{Finite I} (B : translation (vec O)) (a : vec I) : leaf (mat O I) (vec I) (vec O) :=
  Leaf (fun W x => after B (apply W x)) (fun _ x _ => dot a x = 1) (fun W _ delta => rank_one W delta a) _.
Next Obligation.
  intros O I F B a W x delta E; cbv beta in *.
  rewrite rank_one_at, <- after_add; f_equal; extensionality o; simpl; rewrite E; ring.
Qed.
Program Definition linear {O I} `{Finite I} (B : translation (vec O)) : leaf (mat O I) (vec I) (vec O) :=
  Leaf (fun W x => after B (apply W x)) (fun _ x _ => x <> zero) (fun W x delta => rank_one W delta (direction x)) _.
Next Obligation.
  intros O I F B W x delta N; cbv beta in *.
  rewrite rank_one_at, direction_at, <- after_add by assumption; f_equal; extensionality o; simpl; ring.
Qed.
(** f(x) + b. *)
Program Definition bias {X Y} `{Space Y} (f : X -> Y) : leaf Y X Y :=
  Leaf (fun b x => add (f x) b) (fun _ _ _ => True) (fun b _ delta => add b delta) _.
Next Obligation. intros; apply add_assoc. Qed.
(** m o x. *)
Program Definition elementwise {I} : leaf (vec I) (vec I) (vec I) :=
  Leaf times (fun _ x delta => forall i, x i = 0 -> delta i = 0) (fun m x delta => add m (quotient delta x)) _.
Next Obligation.
  intros I m x delta H; extensionality i; unfold times; simpl; unfold quotient.
  destruct (Req_dec (x i) 0) as [E | N]; [rewrite E, (H i E); ring | field; auto].
Qed.

(** A convolution over time, channel by channel: taps c on a window of positions, the last of which is now. *)
Definition column {K D} (z : K -> vec D) (i : D) : vec K := fun k => z k i.
Definition convolved {K D} `{Finite K} (skip factor : R) (c : mat D (K + unit)) (z : K + unit -> vec D) : vec D :=
  fun i => factor * (dot (c i) (column z i) + skip * z (inr tt) i).
Definition rank_taps {K D} `{Finite K} (factor : R) (c : mat D K) (z : K -> vec D) (delta : vec D) : mat D K :=
  fun i k => c i k + delta i / factor * direction (column z i) k.
Program Definition taps {K D} `{Finite K} (skip factor : R) : leaf (mat D (K + unit)) (K + unit -> vec D) (vec D) :=
  Leaf (convolved skip factor) (fun _ z delta => factor <> 0 /\ forall i, column z i = zero -> delta i = 0)
       (fun c z delta => rank_taps factor c z delta) _.
Next Obligation.
  intros K D F skip factor c z delta [N Z]; extensionality i; simpl; unfold convolved, rank_taps.
  rewrite dot_add_l, dot_scale_l; fold (dot (c i) (column z i)).
  destruct (zero_or_not (column z i)) as [E | M].
  - rewrite (Z i E); unfold Rdiv; ring.
  - rewrite direction_at by assumption; field; auto.
Qed.

(** The experts that were chosen, and their shares. *)
Definition choice (K E : Type) := ((K -> E) * (K -> R))%type.
Definition expert {K E} (c : choice K E) : K -> E := fst c.
Definition share {K E} (c : choice K E) : K -> R := snd c.
Definition evenly {K E} (c : choice K E) : choice K E := (expert c, fun _ => 1).
Definition distinct {K E} (e : K -> E) := forall j k, e j = e k -> j = k.
Definition mix {K O} `{Finite K} (s : K -> R) (y : K -> vec O) : vec O := fun o => sum (fun j => s j * y j o).
Definition only {E} `{Finite E} (e e' : E) (r : R) : R := if same e e' then r else 0.
(** sum over j of delta_j a_j^T into the matrix of the expert e_j. *)
Definition rank_each {K E O I} `{Finite K} `{Finite E} (W : E -> mat O I) (e : K -> E) (delta : K -> vec O)
  (a : K -> vec I) : E -> mat O I := fun f o i => W f o i + sum (fun j => only (e j) f (delta j o * a j i)).

Lemma only_same {E} `{Finite E} (e : E) r : only e e r = r.
Proof. unfold only; destruct (same e e); congruence. Qed.
Lemma only_other {E} `{Finite E} (e f : E) r : e <> f -> only e f r = 0.
Proof. unfold only; destruct (same e f); congruence. Qed.
Lemma only_scale {E} `{Finite E} (e f : E) c r : only e f (c * r) = c * only e f r.
Proof. unfold only; destruct (same e f); ring. Qed.
Lemma rank_each_at {K E O I} `{Finite K} `{Finite E} `{Finite I} (W : E -> mat O I)
  (e : K -> E) delta a j x o : distinct e ->
  apply (rank_each W e delta a (e j)) x o = apply (W (e j)) x o + delta j o * dot (a j) x.
Proof.
  intro D; unfold apply, rank_each; rewrite dot_add_l; f_equal.
  unfold sum at 1; rewrite dot_sum_l. fold (sum (fun k => dot (fun i => only (e k) (e j) (delta k o * a k i)) x)).
  rewrite (sum_one _ j).
  - rewrite <- dot_scale_l; unfold dot; apply sum_ext; intro; now rewrite only_same.
  - intros k N. unfold dot; rewrite (sum_ext _ (fun _ => 0 * 0)), sum_scale; [ring |].
    intro; rewrite only_other; [ring |]. intro E1; apply N; now apply D.
Qed.
Program Definition experts {K E O I} `{Finite K} `{Finite E} `{Finite I} (B : E -> translation (vec O))
  (c : choice K E) : leaf (E -> mat O I) (K -> vec I) (K -> vec O) :=
  Leaf (fun W x j => after (B (expert c j)) (apply (W (expert c j)) (x j)))
       (fun _ x delta => distinct (expert c) /\ forall j, x j = zero -> delta j = zero)
       (fun W x delta => rank_each W (expert c) delta (fun j => direction (x j))) _.
Next Obligation.
  intros K E O I FK FE FI B c W x delta [D Z]; extensionality j.
  transitivity (add (after (B (expert c j)) (apply (W (expert c j)) (x j))) (delta j)); [cbv beta | reflexivity].
  rewrite <- after_add; f_equal; extensionality o.
  rewrite (rank_each_at W (expert c) _ _ j _ o D); simpl.
  destruct (zero_or_not (x j)) as [E0 | N]; [rewrite (Z j E0); unfold zero | rewrite direction_at by assumption]; ring.
Qed.

(** The sum over the chosen experts: the least change of their last matrices. *)
Definition weight {K I} `{Finite K} `{Finite I} (s : K -> R) (y : K -> vec I) : R :=
  sum (fun j => s j * s j * dot (y j) (y j)).
Lemma weight_positive {K I} `{Finite K} `{Finite I} (s : K -> R) (y : K -> vec I) j :
  s j <> 0 -> y j <> zero -> 0 < weight s y.
Proof.
  intros S N. assert (Q : forall k, 0 <= dot (y k) (y k)) by (intro; apply over_nonneg; intro; apply Rle_0_sqr).
  apply over_positive with j; [| apply every |].
  - intro; apply Rmult_le_pos; [apply Rle_0_sqr | apply Q].
  - apply Rmult_lt_0_compat; [now apply Rsqr_pos_lt | specialize (Q j); pose proof (dot_self _ N); lra].
Qed.
Program Definition mixture {K E O I} `{Finite K} `{Finite E} `{Finite I} (B : E -> translation (vec O))
  (c : choice K E) : leaf (E -> mat O I) (K -> vec I) (vec O) :=
  Leaf (fun W y => mix (share c) (fun j => after (B (expert c j)) (apply (W (expert c j)) (y j))))
       (fun _ y _ => distinct (expert c) /\ exists j, share c j <> 0 /\ y j <> zero)
       (fun W y delta => rank_each W (expert c)
          (fun j => scale (share c j / weight (share c) y) delta) y) _.
Next Obligation.
  intros K E O I FK FE FI B c W y delta [D [k [S N]]]; pose proof (weight_positive _ _ _ S N) as Q.
  extensionality o; change (add ?a delta o) with (a o + delta o); unfold mix.
  transitivity (sum (fun j => share c j * after (B (expert c j)) (apply (W (expert c j)) (y j)) o
    + delta o / weight (share c) y * (share c j * share c j * dot (y j) (y j)))).
  - apply sum_ext; intro j.
    replace (apply (rank_each _ _ _ _ _) (y j)) with
      (add (apply (W (expert c j)) (y j)) (scale (share c j / weight (share c) y * dot (y j) (y j)) delta)).
    + rewrite after_add; simpl; unfold scale, Rdiv; ring.
    + extensionality o'; rewrite (rank_each_at W (expert c) _ _ j _ o' D); simpl; unfold scale, Rdiv; ring.
  - rewrite sum_add, sum_scale. fold (weight (share c) y). field; lra.
Qed.

(** *** Many tokens with one patch (section 5). [T] holds the tokens. *)

Definition rank_all {T O I} `{Finite T} (W : mat O I) (delta : T -> vec O) (a : T -> vec I) : mat O I :=
  fun o i => W o i + sum (fun s => delta s o * a s i).
(** W z_t (+ b). [a] are the rows of a matrix A with (D A) Z = D: A = Z^+ where dependent z_t have dependent targets. *)
Program Definition linear_jointly {T O I} `{Finite T} `{Finite I} (B : translation (vec O)) (a : T -> vec I) :
  leaf (mat O I) (T -> vec I) (T -> vec O) :=
  Leaf (fun W z t => after B (apply W (z t)))
       (fun _ z delta => forall t o, sum (fun s => delta s o * dot (a s) (z t)) = delta t o)
       (fun W z delta => rank_all W delta a) _.
Next Obligation.
  intros T O I FT FI B a W z delta E; extensionality t.
  transitivity (add (after B (apply W (z t))) (delta t)); [cbv beta | reflexivity].
  rewrite <- after_add; f_equal; extensionality o; simpl; unfold apply at 1, rank_all.
  rewrite dot_add_l; unfold apply; f_equal. rewrite <- (E t o) at 1. unfold sum at 1.
  rewrite dot_sum_l; apply over_ext; intro; apply dot_scale_l.
Qed.
(** f(z_t) + b: all differences are one and the same, [common]. *)
Program Definition bias_jointly {T X Y} `{Space Y} (f : X -> Y) (common : Y) : leaf Y (T -> X) (T -> Y) :=
  Leaf (fun b x t => add (f (x t)) b) (fun _ _ delta => forall t, delta t = common) (fun b _ _ => add b common) _.
Next Obligation. intros T X Y S f k b x delta E; extensionality t; simpl; rewrite E; apply add_assoc. Qed.
(** m o x_t: all quotients are one and the same. *)
Program Definition elementwise_jointly {T I} (common : vec I) : leaf (vec I) (T -> vec I) (T -> vec I) :=
  Leaf (fun m x t => times m (x t)) (fun _ x delta => forall t, delta t = times common (x t))
       (fun m _ _ => add m common) _.
Next Obligation.
  intros T I k m x delta E; extensionality t; extensionality i; simpl; rewrite E; unfold times; simpl; ring.
Qed.
(** Each expert's matrix jointly over the rows (t, j) that chose it. *)
Definition rank_rows {T K E O I} `{Finite T} `{Finite K} `{Finite E} (W : E -> mat O I) (e : T -> K -> E)
  (delta : T -> K -> vec O) (a : T -> K -> vec I) : E -> mat O I :=
  fun f o i => W f o i + sum (fun s => sum (fun k => only (e s k) f (delta s k o * a s k i))).
Program Definition experts_jointly {T K E O I} `{Finite T} `{Finite K} `{Finite E} `{Finite I}
  (B : E -> translation (vec O)) (a : T -> K -> vec I) (c : T -> choice K E) :
  leaf (E -> mat O I) (T -> K -> vec I) (T -> K -> vec O) :=
  Leaf (fun W x t j => after (B (expert (c t) j)) (apply (W (expert (c t) j)) (x t j)))
       (fun _ x delta => forall t j o, sum (fun s => sum (fun k =>
          only (expert (c s) k) (expert (c t) j) (delta s k o * dot (a s k) (x t j)))) = delta t j o)
       (fun W x delta => rank_rows W (fun t => expert (c t)) delta a) _.
Next Obligation.
  intros T K E O I FT FK FE FI B a c W x delta Q; extensionality t; extensionality j.
  transitivity (add (after (B (expert (c t) j)) (apply (W (expert (c t) j)) (x t j))) (delta t j)); [cbv beta | reflexivity].
  rewrite <- after_add; f_equal; extensionality o; simpl; unfold apply, rank_rows.
  rewrite dot_add_l; f_equal. rewrite <- (Q t j o). unfold sum at 1; rewrite dot_sum_l; apply over_ext; intro s.
  unfold sum at 1; rewrite dot_sum_l; apply over_ext; intro k.
  unfold dot, only; destruct (same (expert (c s) k) (expert (c t) j)).
  - rewrite <- sum_scale; apply sum_ext; intro; ring.
  - rewrite (sum_ext _ (fun _ => 0 * 0)), sum_scale; intros; ring.
Qed.
Definition rank_stacked {T E O I} `{Finite T} (W : E -> mat O I) (delta : T -> vec O) (a : T -> E -> vec I) :
  E -> mat O I := fun e o i => W e o i + sum (fun s => delta s o * a s e i).
(** The sum over the experts, jointly: [a] are rows of the pseudo-inverse of the stacked vectors (s_tj y_tj)_j. *)
Program Definition mixture_jointly {T K E O I} `{Finite T} `{Finite K} `{Finite E} `{Finite I}
  (B : E -> translation (vec O)) (a : T -> E -> vec I) (c : T -> choice K E) :
  leaf (E -> mat O I) (T -> K -> vec I) (T -> vec O) :=
  Leaf (fun W y t => mix (share (c t)) (fun j => after (B (expert (c t) j)) (apply (W (expert (c t) j)) (y t j))))
       (fun _ y delta => forall t o, sum (fun s =>
          delta s o * sum (fun j => share (c t) j * dot (a s (expert (c t) j)) (y t j))) = delta t o)
       (fun W y delta => rank_stacked W delta a) _.
Next Obligation.
  intros T K E O I FT FK FE FI B a c W y delta Q; extensionality t; extensionality o.
  change (add ?u delta t o) with (u t o + delta t o); cbv beta; unfold mix.
  rewrite <- (Q t o). transitivity (sum (fun j => share (c t) j *
      after (B (expert (c t) j)) (apply (W (expert (c t) j)) (y t j)) o
    + sum (fun s => share (c t) j * (delta s o * dot (a s (expert (c t) j)) (y t j))))).
  - apply sum_ext; intro j.
    replace (apply (rank_stacked W delta a (expert (c t) j)) (y t j)) with (add (apply (W (expert (c t) j)) (y t j))
      (fun o => sum (fun s => delta s o * dot (a s (expert (c t) j)) (y t j)))).
    + rewrite after_add; simpl; rewrite sum_scale; ring.
    + extensionality o'; unfold apply, rank_stacked; rewrite dot_add_l; simpl; f_equal. unfold sum at 2; rewrite dot_sum_l.
      apply over_ext; intro; now rewrite dot_scale_l.
  - rewrite sum_add; f_equal; unfold sum; rewrite over_swap; apply over_ext; intro s.
    rewrite <- over_scale; apply over_ext; intro; ring.
Qed.

(** ** 4. The output side *)

(** What is put together with a node's output and can be undone: comb s y = w for y = und s w. *)
Record undo (S Y Z : Type) := Undo {
  comb : S -> Y -> Z; und : S -> Z -> Y; und_can : S -> Z -> Prop;
  und_ok : forall s w, und_can s w -> comb s (und s w) = w }.
Arguments Undo {S Y Z}. Arguments comb {S Y Z}. Arguments und {S Y Z}.
Arguments und_can {S Y Z}. Arguments und_ok {S Y Z}.

Program Definition sum_after {Y} `{Space Y} : undo Y Y Y := (* s + y *)
  Undo (fun s y => add s y) (fun s w => sub w s) (fun _ _ => True) _.
Next Obligation. intros; apply add_sub. Qed.
Program Definition sum_before {Y} `{Space Y} : undo Y Y Y := (* y + s *)
  Undo (fun s y => add y s) (fun s w => sub w s) (fun _ _ => True) _.
Next Obligation. intros; cbv beta; rewrite add_comm; apply add_sub. Qed.
Program Definition both {S S' Y Z V} (u : undo S Y Z) (t : undo S' Z V) : undo (S * S') Y V :=
  Undo (fun s y => comb t (snd s) (comb u (fst s) y)) (fun s w => und u (fst s) (und t (snd s) w))
       (fun s w => und_can t (snd s) w /\ und_can u (fst s) (und t (snd s) w)) _.
Next Obligation. intros S S' Y Z V u t s w [A B]; cbv beta; now rewrite (und_ok u), (und_ok t). Qed.
Program Definition each {T S Y Z} (u : undo S Y Z) : undo (T -> S) (T -> Y) (T -> Z) :=
  Undo (fun s y t => comb u (s t) (y t)) (fun s w t => und u (s t) (w t)) (fun s w => forall t, und_can u (s t) (w t)) _.
Next Obligation. intros T S Y Z u s w A; extensionality t; now apply und_ok. Qed.
Definition nonzero {I} (m : vec I) := forall i, m i <> 0.
Program Definition factor {I} : undo (vec I) (vec I) (vec I) := (* m o y *)
  Undo times (fun m w => quotient w m) (fun m _ => nonzero m) _.
Next Obligation. intros I m w N; extensionality i; unfold times, quotient; field; apply N. Qed.
Program Definition factor_before {I} : undo (vec I) (vec I) (vec I) := (* y o m *)
  Undo (fun m y => times y m) (fun m w => quotient w m) (fun m _ => nonzero m) _.
Next Obligation. intros I m w N; extensionality i; unfold times, quotient; field; apply N. Qed.
Program Definition multiple {I} : undo R (vec I) (vec I) := (* c y *)
  Undo scale (fun c w => scale (/ c) w) (fun c _ => c <> 0) _.
Next Obligation. intros I c w N; extensionality i; unfold scale; field; auto. Qed.
Definition soft_cap {I} (c : R) : vec I -> vec I := map (fun x => c * tanh (x / c)).
(** [inv] is any function that undoes tanh at the target: there is one when |w_i| < c. *)
Program Definition capped {I} (inv : R -> R) : undo R (vec I) (vec I) :=
  Undo soft_cap (fun c => map (fun w => c * inv (w / c))) (fun c w => c <> 0 /\ forall i, tanh (inv (w i / c)) = w i / c) _.
Next Obligation.
  intros I inv c w [P A]; extensionality i; unfold soft_cap, map.
  replace (c * inv (w i / c) / c) with (inv (w i / c)) by (field; auto). rewrite A; field; auto.
Qed.

(** O-after-fixed: g(p(y)). *)
Program Definition O_after_fixed {P X Y Z} (p : X -> Y) (g : output P Y Z) : output P X Z :=
  Output (fun q x => output_at g q (p x)) (fun q x => output_can g q (p x)) (fun q x => output_move g q (p x)) _.
Next Obligation. intros; now apply (output_ok g). Qed.
(** O-sum, O-factor, O-times, O-through-bijection: comb(s(x), g(x)), s fixed. *)
Program Definition O_undo {P X S Y Z} (u : undo S Y Z) (s : X -> S) (g : output P X Y) : output P X Z :=
  Output (fun q x => comb u (s x) (output_at g q x))
         (fun q x w => und_can u (s x) w /\ output_can g q x (und u (s x) w))
         (fun q x w => output_move g q x (und u (s x) w)) _.
Next Obligation. intros P X S Y Z u s g q x w [A B]; cbv beta; now rewrite (output_ok g), (und_ok u). Qed.
(** A leaf on the output side, its input and a choice of experts read from x. *)
Program Definition O_leaf {P X Y} `{Space Y} (l : leaf P X Y) : output P X Y :=
  Output (leaf_at l) (fun q y w => leaf_can l q y (sub w (leaf_at l q y)))
         (fun q y w => leaf_move l q y (sub w (leaf_at l q y))) _.
Next Obligation. intros; cbv beta; rewrite (leaf_ok l) by assumption; apply add_sub. Qed.
(** O-mixture: the last maps l(c) of the experts that c(x) chooses, at their inner activations y(x). *)
Program Definition O_mixture {P C X Y Z} `{Space Z} (l : C -> leaf P Y Z) (c : X -> C) (y : X -> Y) : output P X Z :=
  Output (fun q x => leaf_at (l (c x)) q (y x))
         (fun q x w => leaf_can (l (c x)) q (y x) (sub w (leaf_at (l (c x)) q (y x))))
         (fun q x w => leaf_move (l (c x)) q (y x) (sub w (leaf_at (l (c x)) q (y x)))) _.
Next Obligation. intros; cbv beta; rewrite leaf_ok by assumption; apply add_sub. Qed.

(** ** 5. The input side *)

Program Definition I_leaf {P X Y} `{Space Y} (l : leaf P X Y) : input P X Y :=
  Input (leaf_at l) (fun p z z' => leaf_can l p z (sub (leaf_at l p z') (leaf_at l p z)))
        (fun p z z' => leaf_move l p z (sub (leaf_at l p z') (leaf_at l p z))) _.
Next Obligation. intros; cbv beta; rewrite (leaf_ok l) by assumption; apply add_sub. Qed.
(** I-constant: it does not see its input. *)
Definition I_constant {X Y} (c : Y) : input unit X Y :=
  Input (fun _ _ => c) (fun _ _ _ => True) (fun p _ _ => p) (fun _ _ _ _ => eq_refl).
(** I-before: f(p(z)). *)
Program Definition I_before {P X Y Z} (p : X -> Y) (f : input P Y Z) : input P X Z :=
  Input (fun q z => input_at f q (p z)) (fun q z z' => input_can f q (p z) (p z'))
        (fun q z z' => input_move f q (p z) (p z')) _.
Next Obligation. intros; now apply (input_ok f). Qed.
(** I-after: q(f(z)). *)
Program Definition I_after {P X Y Z} (q : Y -> Z) (f : input P X Y) : input P X Z :=
  Input (fun p z => q (input_at f p z)) (input_can f) (input_move f) _.
Next Obligation. intros; cbv beta; now rewrite (input_ok f). Qed.
(** I-combine: q(f1(z), f2(z)), the parameters apart. *)
Program Definition I_combine {P P' X Y Y' Z} (q : Y -> Y' -> Z) (f : input P X Y) (f' : input P' X Y') :
  input (P * P') X Z :=
  Input (fun p z => q (input_at f (fst p) z) (input_at f' (snd p) z))
        (fun p z z' => input_can f (fst p) z z' /\ input_can f' (snd p) z z')
        (fun p z z' => (input_move f (fst p) z z', input_move f' (snd p) z z')) _.
Next Obligation.
  intros P P' X Y Y' Z q f f' p z z' [A B]; cbn [fst snd]; now rewrite (input_ok f), (input_ok f').
Qed.
(** I-mixture: the router decides c; the experts' inner maps f(c) follow; their last maps stay. *)
Program Definition I_mixture {P Q L C X Y Z} (r : input P X L) (route : L -> C) (f : C -> input Q X Y)
  (last : C -> Y -> Z) : input (P * Q) X Z :=
  Input (fun p z => last (route (input_at r (fst p) z))
                         (input_at (f (route (input_at r (fst p) z))) (snd p) z))
        (fun p z z' => input_can r (fst p) z z' /\ input_can (f (route (input_at r (fst p) z'))) (snd p) z z')
        (fun p z z' => (input_move r (fst p) z z', input_move (f (route (input_at r (fst p) z'))) (snd p) z z')) _.
Next Obligation.
  intros P Q L C X Y Z r route f last p z z' [A B]; cbn [fst snd]; rewrite (input_ok r) by assumption.
  now rewrite (input_ok (f _)).
Qed.
(** I-by-output: Theorem 1b without a skip. *)
Program Definition I_by_output {P X Y} (g : output P X Y) : input P X Y :=
  Input (output_at g) (fun p z z' => output_can g p z (output_at g p z'))
        (fun p z z' => output_move g p z (output_at g p z')) _.
Next Obligation. intros; now apply (output_ok g). Qed.
Program Definition I_by_through {P A X Y} (c : through P A X Y) : input P X Y :=
  Input (through_at c) (fun p z z' => through_can c p z z' (through_at c p z'))
        (fun p z z' => through_move c p z z' (through_at c p z')) _.
Next Obligation. intros; now apply (through_ok c). Qed.

(** ** 6. Through *)

(** T-split: f as in the target run, then g. *)
Program Definition T_split {P Q X Y Z} (f : input P X Y) (g : output Q Y Z) : through (P * Q) Y X Z :=
  Through (fun p x => output_at g (snd p) (input_at f (fst p) x)) (fun p x => input_at f (fst p) x)
          (fun p z z' w => input_can f (fst p) z z' /\ output_can g (snd p) (input_at f (fst p) z') w)
          (fun p z z' w => (input_move f (fst p) z z', output_move g (snd p) (input_at f (fst p) z') w)) _ _.
Next Obligation. intros P Q X Y Z f g p z z' w [A B]; now apply (input_ok f). Qed.
Next Obligation.
  intros P Q X Y Z f g p z z' w [A B]; cbn [fst snd]; rewrite (input_ok f) by assumption; now apply (output_ok g).
Qed.
(** T-before: c(p(x)). *)
Program Definition T_before {P A X Y Z} (p : X -> Y) (c : through P A Y Z) : through P A X Z :=
  Through (fun q x => through_at c q (p x)) (fun q x => inside c q (p x))
          (fun q z z' => through_can c q (p z) (p z')) (fun q z z' => through_move c q (p z) (p z')) _ _.
Next Obligation. intros; now apply (inside_ok c). Qed.
Next Obligation. intros; now apply (through_ok c). Qed.
(** The rules of the output side, through: comb(s(x), c(x)), s fixed; and T-sum where the other terms stay. *)
Program Definition T_undo {P A X S Y Z} (u : undo S Y Z) (s : X -> S) (c : through P A X Y) : through P A X Z :=
  Through (fun q x => comb u (s x) (through_at c q x)) (inside c)
          (fun q z z' w => und_can u (s z) w /\ through_can c q z z' (und u (s z) w))
          (fun q z z' w => through_move c q z z' (und u (s z) w)) _ _.
Next Obligation. intros P A X S Y Z u s c q z z' w [B D]; now apply (inside_ok c). Qed.
Next Obligation. intros P A X S Y Z u s c q z z' w [B D]; cbv beta; now rewrite (through_ok c), (und_ok u). Qed.
(** T-sum: another term f is given the values of the target run, c makes up for it. *)
Program Definition T_sum {P Q A X S Y Z} (u : undo S Y Z) (f : input P X S) (c : through Q A X Y) :
  through (P * Q) (S * A) X Z :=
  Through (fun p x => comb u (input_at f (fst p) x) (through_at c (snd p) x))
          (fun p x => (input_at f (fst p) x, inside c (snd p) x))
          (fun p z z' w => input_can f (fst p) z z' /\ und_can u (input_at f (fst p) z') w /\
                           through_can c (snd p) z z' (und u (input_at f (fst p) z') w))
          (fun p z z' w => (input_move f (fst p) z z', through_move c (snd p) z z' (und u (input_at f (fst p) z') w))) _ _.
Next Obligation.
  intros P Q A X S Y Z u f c p z z' w (B & D & E); cbn [fst snd]; now rewrite (input_ok f), (inside_ok c).
Qed.
Next Obligation.
  intros P Q A X S Y Z u f c p z z' w (B & D & E); cbn [fst snd]; now rewrite (input_ok f), (through_ok c), (und_ok u).
Qed.
(** T-mixture: router and inner maps as in the target run, then O-mixture. *)
Program Definition T_mixture {P Q V L C X Y Z} `{Space Z} (r : input P X L) (route : L -> C) (f : C -> input Q X Y)
  (l : C -> leaf V Y Z) : through (P * Q * V) (L * Y) X Z :=
  let c p x := route (input_at r (fst (fst p)) x) in
  let inner p x := input_at (f (c p x)) (snd (fst p)) x in
  Through (fun p x => leaf_at (l (c p x)) (snd p) (inner p x)) (fun p x => (input_at r (fst (fst p)) x, inner p x))
          (fun p z z' w => input_can r (fst (fst p)) z z' /\ input_can (f (c p z')) (snd (fst p)) z z' /\
             leaf_can (l (c p z')) (snd p) (inner p z') (sub w (leaf_at (l (c p z')) (snd p) (inner p z'))))
          (fun p z z' w => (input_move r (fst (fst p)) z z', input_move (f (c p z')) (snd (fst p)) z z',
             leaf_move (l (c p z')) (snd p) (inner p z') (sub w (leaf_at (l (c p z')) (snd p) (inner p z'))))) _ _.
Next Obligation.
  intros P Q V L C X Y Z S r route f l c inner p z z' w (A & B & D); subst c inner; cbn [fst snd].
  rewrite (input_ok r) by assumption; now rewrite (input_ok (f _)).
Qed.
Next Obligation.
  intros P Q V L C X Y Z S r route f l c inner p z z' w (A & B & D); subst c inner; cbn [fst snd].
  rewrite (input_ok r) by assumption; rewrite (input_ok (f _)) by assumption.
  rewrite leaf_ok by assumption; apply add_sub.
Qed.

(** *** Values whose weights read them (section 8) *)

(** With the weights w fixed, weighed(s, w, y) reaches every target by the carrier's output y; the weights read view(s, y). *)
Record weighing (S W Y V Z : Type) := Weighing {
  view : S -> Y -> V; weighed : S -> W -> Y -> Z;
  asked : S -> W -> Y -> Z -> Y; askable : S -> W -> Y -> Z -> Prop;
  asked_ok : forall s w y G, askable s w y G -> weighed s w (asked s w y G) = G }.
Arguments Weighing {S W Y V Z}. Arguments view {S W Y V Z}. Arguments weighed {S W Y V Z}.
Arguments asked {S W Y V Z}. Arguments askable {S W Y V Z}. Arguments asked_ok {S W Y V Z}.

(** I-self-weighted: the carrier g for what is missing with the target's weights, then the weights h to these. *)
Program Definition I_self_weighted {P Q X S W Y V Z} (u : weighing S W Y V Z) (beside : X -> S) (g : output P X Y)
  (h : input Q V W) : input (P * Q) X Z :=
  let seen p x := view u (beside x) (output_at g (fst p) x) in
  let weights p x := input_at h (snd p) (seen p x) in
  let all p x := weighed u (beside x) (weights p x) (output_at g (fst p) x) in
  let carried p z z' := let y := asked u (beside z) (weights p z') (output_at g (fst p) z) (all p z') in y in
  Input all
    (fun p z z' => askable u (beside z) (weights p z') (output_at g (fst p) z) (all p z') /\
       output_can g (fst p) z (carried p z z') /\ input_can h (snd p) (view u (beside z) (carried p z z')) (seen p z'))
    (fun p z z' => (output_move g (fst p) z (carried p z z'),
       input_move h (snd p) (view u (beside z) (carried p z z')) (seen p z'))) _.
Next Obligation.
  intros P Q X S W Y V Z u beside g h seen weights all carried p z z' (A & B & D).
  set (y := carried p z z') in *; set (g' := output_move g (fst p) z y).
  change (weighed u (beside z) (input_at h (input_move h (snd p) (view u (beside z) y) (seen p z'))
    (view u (beside z) (output_at g g' z))) (output_at g g' z) = all p z').
  unfold g'; rewrite (output_ok g), (input_ok h) by assumption.
  now apply asked_ok.
Qed.
(** The same where the carrier has branches inside. What it gives as it is must not be asked for. *)
Program Definition I_self_weighted_through {P Q A X S W Y V Z} (u : weighing S W Y V Z) (beside : X -> S)
  (c : through P A X Y) (h : input Q V W) : input (P * Q) X Z :=
  let seen p x := view u (beside x) (through_at c (fst p) x) in
  let weights p x := input_at h (snd p) (seen p x) in
  let all p x := weighed u (beside x) (weights p x) (through_at c (fst p) x) in
  let carried p z z' := let y := asked u (beside z) (weights p z') (through_at c (fst p) z') (all p z') in y in
  Input all
    (fun p z z' => askable u (beside z) (weights p z') (through_at c (fst p) z') (all p z') /\
       through_can c (fst p) z z' (carried p z z') /\ input_can h (snd p) (view u (beside z) (carried p z z')) (seen p z'))
    (fun p z z' => (through_move c (fst p) z z' (carried p z z'),
       input_move h (snd p) (view u (beside z) (carried p z z')) (seen p z'))) _.
Next Obligation.
  intros P Q A' X S W Y V Z u beside c h seen weights all carried p z z' (A & B & D).
  set (y := carried p z z') in *; set (g' := through_move c (fst p) z z' y).
  change (weighed u (beside z) (input_at h (input_move h (snd p) (view u (beside z) y) (seen p z'))
    (view u (beside z) (through_at c g' z))) (through_at c g' z) = all p z').
  unfold g'; rewrite (through_ok c), (input_ok h) by assumption.
  now apply asked_ok.
Qed.
Program Definition each_weighing {T S W Y V Z} (u : weighing S W Y V Z) :
  weighing (T -> S) (T -> W) (T -> Y) (T -> V) (T -> Z) :=
  Weighing (fun s y t => view u (s t) (y t)) (fun s w y t => weighed u (s t) (w t) (y t))
    (fun s w y G t => asked u (s t) (w t) (y t) (G t)) (fun s w y G => forall t, askable u (s t) (w t) (y t) (G t)) _.
Next Obligation. intros T S W Y V Z u s w y G A; extensionality t; now apply asked_ok. Qed.

(** Streams: one long vector as rows; what writes into all of them; and the sum that they collapse to. *)
Definition rows {N D} (x : vec (N * D)) : N -> vec D := fun n i => x (n, i).
Definition joined {N D} (S : N -> vec D) : vec (N * D) := fun p => S (fst p) (snd p).
Program Definition as_rows {N D} : undo unit (vec (N * D)) (N -> vec D) :=
  Undo (fun _ y => rows y) (fun _ S => joined S) (fun _ _ => True) _.
Next Obligation. reflexivity. Qed.
Definition remixed {N D} `{Finite N} (M : vec (N * N)) (S : N -> vec D) : N -> vec D :=
  fun k i => sum (fun j => M (j, k) * S j i).
Definition written {N D} (S : N -> vec D) (b : vec N) (u : vec D) : N -> vec D := fun n i => S n i + b n * u i.
Definition per_stream {N D} (w : vec N) : N -> vec D := fun n _ => w n.
Definition part {N D} (least : R) (w V : N -> vec D) : N -> vec D := fun n i => (w n i + least) * V n i.
Definition collapse {N D} `{Finite N} (least : R) (w V : N -> vec D) : vec D := fun i => sum (fun n => part least w V n i).
Definition room {N D} `{Finite N} (least : R) (w : N -> vec D) (b : vec N) : vec D :=
  fun i => sum (fun n => (w n i + least) * b n).
(** V = S + b (x) u, and u carries. *)
Program Definition written_streams {N D} `{Finite N} (least : R) :
  weighing ((N -> vec D) * vec N) (N -> vec D) (vec D) (N -> vec D) (vec D) :=
  Weighing (fun s u => written (fst s) (snd s) u) (fun s w u => collapse least w (written (fst s) (snd s) u))
    (fun s w _ G => quotient (sub G (collapse least w (fst s))) (room least w (snd s)))
    (fun s w _ _ => nonzero (room least w (snd s))) _.
Next Obligation.
  intros N D F least [S b] w y G A; cbn [fst snd] in *; extensionality i.
  set (u := quotient _ _); transitivity (collapse least w S i + u i * room least w b i).
  - unfold collapse, room; rewrite <- sum_scale, <- sum_add; apply sum_ext; intro; unfold part, written; ring.
  - unfold u, quotient; simpl; field; apply A.
Qed.
(** V itself carries: the nearest in relative terms. *)
Definition nearest {N D} `{Finite N} (least : R) (w V : N -> vec D) (G : vec D) : N -> vec D := fun n i =>
  V n i + V n i * part least w V n i * (G i - collapse least w V i) / sum (fun n => part least w V n i * part least w V n i).
Program Definition streams {N D} `{Finite N} (least : R) :
  weighing unit (N -> vec D) (N -> vec D) (N -> vec D) (vec D) :=
  Weighing (fun _ V => V) (fun _ w V => collapse least w V) (fun _ w V G => nearest least w V G)
    (fun _ w V _ => forall i, sum (fun n => part least w V n i * part least w V n i) <> 0) _.
Next Obligation.
  intros N D F least [] w V G A; cbv beta in *; extensionality i; specialize (A i).
  set (q := sum (fun n => part least w V n i * part least w V n i)) in *.
  transitivity (collapse least w V i + (G i - collapse least w V i) / q * q); [| field; auto].
  unfold q at 2; unfold collapse at 1 2; rewrite <- sum_scale, <- sum_add; apply sum_ext; intro n.
  unfold part at 1, nearest; fold q; unfold part; field; auto.
Qed.
(** p + (1 + g_0)(a - p), and a carries: the weights read it alone. *)
Definition corrected {G D} (p a : vec D) (g : vec (unit + G)) : vec D := fun i => p i + (1 + g (inl tt)) * (a i - p i).
Program Definition correction {G D} : weighing (vec D) (vec (unit + G)) (vec D) (vec D) (vec D) :=
  Weighing (fun _ a => a) (fun p g a => corrected p a g)
    (fun p g _ w => add p (scale (/ (1 + g (inl tt))) (sub w p))) (fun _ g _ _ => 1 + g (inl tt) <> 0) _.
Next Obligation. intros G D p g a w A; extensionality i; unfold corrected, scale; simpl; field; auto. Qed.

(** ** 7. The theorems *)

(** Theorem 1 for a block comb(s, g(f(x))), with its patch. The skip s may read what f moves: it is read after the input patch. *)
Program Definition theorem_1 {P Q X S Y Z V} (u : undo S Z V) (s : P -> X -> S) (f : input P X Y) (g : output Q Y Z) :
  input (P * Q) X V :=
  let at_ := fun p x => comb u (s (fst p) x) (output_at g (snd p) (input_at f (fst p) x)) in
  let wanted := fun p z z' => und u (s (input_move f (fst p) z z') z) (at_ p z') in
  Input at_
        (fun p z z' => input_can f (fst p) z z' /\ und_can u (s (input_move f (fst p) z z') z) (at_ p z') /\
           output_can g (snd p) (input_at f (fst p) z') (wanted p z z'))
        (fun p z z' => (input_move f (fst p) z z', output_move g (snd p) (input_at f (fst p) z') (wanted p z z'))) _.
Next Obligation.
  intros P Q X S Y Z V u s f g at_ wanted p z z' (A & B & D); subst wanted; unfold at_ at 1; cbn [fst snd].
  rewrite (input_ok f) by assumption; now rewrite (output_ok g), (und_ok u).
Qed.
(** Theorem 1 where the branch has branches inside. *)
Definition theorem_1_through {P A X S Y Z} (u : undo S Y Z) (s : X -> S) (c : through P A X Y) : input P X Z :=
  I_by_through (T_undo u s c).
(** Theorem 1b: the outer map alone, at the source activation. *)
Definition theorem_1b {P X S Y Z} (u : undo S Y Z) (s : X -> S) (g : output P X Y) : input P X Z :=
  I_by_output (O_undo u s g).

(** ** 8. The normalised output (section 4) *)

Definition rms {I} `{Finite I} (eps : R) (x : vec I) : vec I := fun i => x i / sqrt (mean_square x + eps).
Definition centred {I} `{Finite I} (x : vec I) : vec I := fun i => x i - mean x.
Definition layer {I} `{Finite I} (eps : R) (x : vec I) : vec I := rms eps (centred x).
(** r^2/(r^2 + eps), the mean square of the normalised activation. *)
Definition ratio (r2 eps : R) : R := r2 / (r2 + eps).

Lemma rms_reach {I} `{Finite I} eps (r2 : R) (u : vec I) :
  0 <= eps -> 0 < r2 -> mean_square u = ratio r2 eps -> rms eps (scale (sqrt (r2 + eps)) u) = u.
Proof.
  intros E P M; extensionality i; unfold rms; rewrite mean_square_scale, M, sqrt_sqrt by lra.
  replace ((r2 + eps) * ratio r2 eps + eps) with (r2 + eps) by (unfold ratio; field; lra).
  unfold scale; field; apply Rgt_not_eq, sqrt_lt_R0; lra.
Qed.
Lemma rms_ball {I} `{Finite I} eps (u : vec I) :
  0 < eps -> mean_square u < 1 -> rms eps (scale (sqrt (eps / (1 - mean_square u))) u) = u.
Proof.
  intros P L; pose proof (mean_square_nonneg u) as N.
  assert (Q : 0 < eps / (1 - mean_square u)) by (apply Rdiv_lt_0_compat; lra).
  extensionality i; unfold rms; rewrite mean_square_scale, sqrt_sqrt by lra.
  replace (eps / (1 - mean_square u) * mean_square u + eps) with (eps / (1 - mean_square u)) by (field; lra).
  unfold scale; field; apply Rgt_not_eq, sqrt_lt_R0; lra.
Qed.

Definition rms_each {N D} `{Finite D} (eps : R) (x : vec (N * D)) : vec (N * D) := joined (fun n => rms eps (rows x n)).
Definition inverse_rms {I} `{Finite I} (eps : R) (x : vec I) : vec unit := fun _ => / sqrt (mean_square x + eps).

(** The route ball, and a normalisation without a scale: n is undone inside the ball. *)
Program Definition ball {I} `{Finite I} (eps : R) : undo unit (vec I) (vec I) :=
  Undo (fun _ y => rms eps y) (fun _ w => scale (sqrt (eps / (1 - mean_square w))) w)
       (fun _ w => 0 < eps /\ mean_square w < 1) _.
Next Obligation. intros I F eps [] w [A B]; now apply rms_ball. Qed.

(** A route: a new scale and a new input of the normalisation which together give what is wanted. *)
Record route (Q Y Z : Type) := Route {
  put : Q -> Y -> Z; new_scale : Q -> Y -> Z -> Q; before : Q -> Y -> Z -> Y; open : Q -> Y -> Z -> Prop;
  route_ok : forall m y G, open m y G -> put (new_scale m y G) (before m y G) = G }.
Arguments Route {Q Y Z}. Arguments put {Q Y Z}. Arguments new_scale {Q Y Z}.
Arguments before {Q Y Z}. Arguments open {Q Y Z}. Arguments route_ok {Q Y Z}.

Section Routes.
Context {I : Type} `{Finite I}.
Implicit Types m y G u : vec I.
Definition mean_of eps y : R := ratio (mean_square y) eps.

(** Any scale m' with mean((G/m')^2) = q serves: y* = (G/m') sqrt(r^2 + eps). *)
Definition serves (eps : R) (m' y G : vec I) : Prop :=
  0 <= eps /\ 0 < mean_square y /\ (forall i, m' i = 0 -> G i = 0) /\ mean_square (quotient G m') = mean_of eps y.
Definition target eps (m' y G : vec I) : vec I := scale (sqrt (mean_square y + eps)) (quotient G m').
Lemma serves_ok eps m' y G : serves eps m' y G -> times m' (rms eps (target eps m' y G)) = G.
Proof.
  intros (E & P & Z & M); unfold target; rewrite rms_reach by assumption.
  extensionality i; unfold times, quotient; destruct (Req_dec (m' i) 0) as [A | A]; [rewrite A, Z; auto; ring | field; auto].
Qed.
(** A scale k t with any k, and mean((G/t)^2) = k^2 q. *)
Definition size_for eps (t y G : vec I) : R := sqrt (mean_square (quotient G t) / mean_of eps y).
Lemma sized eps t y G : 0 <= eps -> 0 < mean_square y -> nonzero t -> G <> zero ->
  serves eps (scale (size_for eps t y G) t) y G.
Proof.
  intros E P N D; assert (0 < mean_of eps y) as Q by (unfold mean_of, ratio; apply Rdiv_lt_0_compat; lra).
  assert (0 < mean_square (quotient G t)) as M.
  { apply mean_square_positive; intro A; apply D; extensionality i; pose proof (f_equal (fun x => x i) A) as B.
    unfold quotient, zero in *; replace (G i) with (G i / t i * t i) by (field; apply N); rewrite B; ring. }
  assert (0 < size_for eps t y G) as K by (apply sqrt_lt_R0, Rdiv_lt_0_compat; auto).
  repeat split; auto.
  - unfold scale; intros i A; apply Rmult_integral in A as [A | A]; [lra | destruct (N i A)].
  - replace (quotient G (scale (size_for eps t y G) t)) with (scale (/ size_for eps t y G) (quotient G t)).
    + rewrite mean_square_scale. unfold size_for at 1 2.
      replace (/ sqrt (mean_square (quotient G t) / mean_of eps y) * / sqrt (mean_square (quotient G t) / mean_of eps y))
        with (/ (mean_square (quotient G t) / mean_of eps y)); [field; split; lra |].
      rewrite <- Rinv_mult. f_equal; symmetry; apply sqrt_sqrt.
      apply Rlt_le, Rdiv_lt_0_compat; auto.
    + extensionality i; unfold scale, quotient; field; split; [apply N | lra].
Qed.

(** m' = c m. *)
Program Definition uniform (eps : R) : route (vec I) (vec I) (vec I) :=
  Route (fun m y => times m (rms eps y)) (fun m y G => scale (size_for eps m y G) m)
        (fun m y G => let new := scale (size_for eps m y G) m in target eps new y G)
        (fun m y G => 0 <= eps /\ 0 < mean_square y /\ nonzero m /\ G <> zero) _.
Next Obligation. intros eps m y G (A & B & C & D); now apply serves_ok, sized. Qed.
(** m'^2 = k^2 (m^2 + |G| mean(m^2)/RMS(G)), the signs of m. *)
Definition weights m G : vec I :=
  fun i => m i * m i + Rabs (G i) * (mean_square m / sqrt (mean_square G)).
Definition balanced_scale m G : vec I := fun i => sqrt (weights m G i) * (m i / Rabs (m i)).
Lemma balanced_nonzero m G : nonzero m -> nonzero (balanced_scale m G).
Proof.
  intros N i; unfold balanced_scale.
  assert (0 <= mean_square m / sqrt (mean_square G)) as A.
  { destruct (Req_dec (sqrt (mean_square G)) 0) as [-> | Q]; [unfold Rdiv; rewrite Rinv_0; lra |].
    apply Rmult_le_pos; [apply mean_square_nonneg | left; apply Rinv_0_lt_compat].
    pose proof (sqrt_pos (mean_square G)); lra. }
  assert (0 < weights m G i) as W.
  { unfold weights; pose proof (Rmult_le_pos _ _ (Rabs_pos (G i)) A); pose proof (Rsqr_pos_lt _ (N i)) as B.
    unfold Rsqr in B; lra. }
  apply Rmult_integral_contrapositive_currified; [apply Rgt_not_eq, sqrt_lt_R0, W |].
  apply Rmult_integral_contrapositive_currified; [apply N | apply Rinv_neq_0_compat, Rabs_no_R0, N].
Qed.
Program Definition balanced (eps : R) : route (vec I) (vec I) (vec I) :=
  Route (fun m y => times m (rms eps y)) (fun m y G => scale (size_for eps (balanced_scale m G) y G) (balanced_scale m G))
        (fun m y G => let new := scale (size_for eps (balanced_scale m G) y G) (balanced_scale m G) in target eps new y G)
        (fun m y G => 0 <= eps /\ 0 < mean_square y /\ nonzero m /\ G <> zero) _.
Next Obligation. intros eps m y G (A & B & C & D); apply serves_ok, sized; auto; now apply balanced_nonzero. Qed.
(** m' = m - mu/m with mu a root of mean((G m/(m^2 - mu))^2) = q: the root is a hypothesis. *)
Definition secular_scale (mu : R) m : vec I := fun i => m i - mu / m i.
Program Definition secular eps (mu : R) : route (vec I) (vec I) (vec I) :=
  Route (fun m y => times m (rms eps y)) (fun m _ _ => secular_scale mu m)
        (fun m y G => let new := secular_scale mu m in target eps new y G)
        (fun m y G => 0 <= eps /\ 0 < mean_square y /\ (forall i, m i <> 0 /\ m i * m i <> mu) /\
           mean (fun i => (G i * m i / (m i * m i - mu)) * (G i * m i / (m i * m i - mu))) = mean_of eps y) _.
Next Obligation.
  intros eps mu m y G (A & B & C & D); apply serves_ok; repeat split; auto.
  - intros i E; destruct (C i) as [N M]; exfalso; apply M; unfold secular_scale in E.
    replace mu with (m i * m i - (m i - mu / m i) * m i) by (field; auto); rewrite E; ring.
  - rewrite <- D; apply mean_ext; intro i; destruct (C i) as [N M]; unfold quotient, secular_scale.
    replace (m i - mu / m i) with ((m i * m i - mu) / m i) by (field; auto). field; split; auto; lra.
Qed.
(** m' = G/n(y); what enters the normalisation stays as it is. *)
Program Definition scale_alone (eps : R) : route (vec I) (vec I) (vec I) :=
  Route (fun m y => times m (rms eps y)) (fun _ y G => quotient G (rms eps y)) (fun _ y _ => y)
        (fun _ y G => forall i, rms eps y i = 0 -> G i = 0) _.
Next Obligation.
  intros eps m y G Z; extensionality i; unfold times, quotient.
  destruct (Req_dec (rms eps y i) 0) as [A | A]; [rewrite A, (Z i A); ring | field; auto].
Qed.

(** LayerNorm without a bias: the mean of y* vanishes, too. *)
Definition both_signs (x : vec I) : vec I := fun i => x i * mean (map Rabs x) - Rabs (x i) * mean x.
Lemma both_signs_mean x : mean (both_signs x) = 0.
Proof.
  unfold both_signs. rewrite (mean_ext _ (fun i => mean (map Rabs x) * x i + - mean x * map Rabs x i)).
  - rewrite mean_add, !mean_scale; change (mean (fun i => x i)) with (mean x).
    change (mean (fun i => map Rabs x i)) with (mean (map Rabs x)); ring.
  - intro; unfold map; ring.
Qed.
Lemma both_signs_zero x i : Rabs (mean x) < mean (map Rabs x) -> both_signs x i = 0 -> x i = 0.
Proof.
  unfold both_signs; generalize (mean (map Rabs x)) (mean x); intros s a A B; apply Rabs_def2 in A.
  assert (x i * (s + a) = 0 \/ x i * (s - a) = 0) as [C | C].
  - destruct (Rcase_abs (x i)) as [L | L]; [left; rewrite Rabs_left in B | right; rewrite Rabs_right in B]; auto; lra.
  - apply Rmult_integral in C as [C | C]; [auto | lra].
  - apply Rmult_integral in C as [C | C]; [auto | lra].
Qed.
Lemma mean_scaled c x : mean (scale c x) = c * mean x.
Proof. apply mean_scale. Qed.
Lemma centred_zero x : mean x = 0 -> centred x = x.
Proof. intro E; extensionality i; unfold centred; rewrite E; ring. Qed.
Definition centred_unit eps m y G : vec I :=
  let x := both_signs (quotient G (balanced_scale m G)) in
  scale (sqrt (mean_of eps (centred y)) / sqrt (mean_square x)) x.
Program Definition centred_balanced (eps : R) : route (vec I) (vec I) (vec I) :=
  Route (fun m y => times m (layer eps y)) (fun m y G => let u := centred_unit eps m y G in quotient G u)
        (fun m y G => let u := centred_unit eps m y G in scale (sqrt (mean_square (centred y) + eps)) u)
        (fun m y G => 0 <= eps /\ 0 < mean_square (centred y) /\ nonzero m /\
           let x := quotient G (balanced_scale m G) in Rabs (mean x) < mean (map Rabs x)) _.
Next Obligation.
  intros eps m y G (A & B & C & D); unfold centred_unit; cbv zeta in *; set (x := quotient G (balanced_scale m G)) in *.
  assert (0 < mean_of eps (centred y)) as Q by (unfold mean_of, ratio; apply Rdiv_lt_0_compat; lra).
  assert (0 < mean_square (both_signs x)) as P.
  { apply mean_square_positive; intro E; assert (x = zero) as F.
    - extensionality i; apply both_signs_zero; auto; now rewrite E.
    - rewrite F in D. replace (mean (map Rabs zero)) with (mean (zero (I := I))) in D.
      + pose proof (Rle_abs (mean (zero (I := I)))); lra.
      + apply mean_ext; intro; unfold map, zero; now rewrite Rabs_R0. }
  set (k := sqrt (mean_of eps (centred y)) / sqrt (mean_square (both_signs x))).
  assert (K : 0 < k) by (apply Rdiv_lt_0_compat; now apply sqrt_lt_R0).
  unfold layer. replace (centred (scale _ (scale k (both_signs x))))
    with (scale (sqrt (mean_square (centred y) + eps)) (scale k (both_signs x))).
  - rewrite rms_reach; auto.
    + extensionality i; unfold times, quotient at 1, scale.
      destruct (Req_dec (both_signs x i) 0) as [Z | Z]; [| field; split; auto; lra].
      rewrite Z; apply both_signs_zero in Z; auto. unfold x, quotient in Z.
      replace (G i) with (G i / balanced_scale m G i * balanced_scale m G i)
        by (field; now apply balanced_nonzero). rewrite Z; ring.
    + rewrite mean_square_scale; unfold k.
      replace (sqrt (mean_of eps (centred y)) / sqrt (mean_square (both_signs x)) *
               (sqrt (mean_of eps (centred y)) / sqrt (mean_square (both_signs x))))
        with (mean_of eps (centred y) / mean_square (both_signs x)); [unfold mean_of; field; lra |].
      rewrite <- (sqrt_sqrt (mean_of eps (centred y))) at 1 by lra.
      rewrite <- (sqrt_sqrt (mean_square (both_signs x))) at 1 by lra.
      field; apply Rgt_not_eq, sqrt_lt_R0, P.
  - symmetry; apply centred_zero. rewrite !mean_scaled, both_signs_mean; ring.
Qed.

(** *** Many tokens, one scale: [s] is the scale that linear programming finds, with every RMS kept. *)
Program Definition keep {T} eps (s : vec I) : route (vec I) (T -> vec I) (T -> vec I) :=
  Route (fun m (y : T -> vec I) t => times m (rms eps (y t))) (fun _ _ _ => s)
        (fun _ (y G : T -> vec I) t => target eps s (y t) (G t)) (fun _ (y G : T -> vec I) => forall t, serves eps s (y t) (G t)) _.
Next Obligation. intros T eps s m y' G' A; extensionality t; now apply serves_ok. Qed.
(** The last resort, for every target: m' = c m with c above every RMS(G_t/m). *)
Definition enlarged_scale {T} `{Finite T} m (G : T -> vec I) : vec I :=
  scale (1 + sum (fun t => mean_square (quotient (G t) m))) m.
Program Definition enlarged {T} `{Finite T} eps : route (vec I) (T -> vec I) (T -> vec I) :=
  Route (fun m (y : T -> vec I) t => times m (rms eps (y t))) (fun m _ (G : T -> vec I) => enlarged_scale m G)
        (fun m _ (G : T -> vec I) t => scale (sqrt (eps / (1 - mean_square (quotient (G t) (enlarged_scale m G)))))
                              (quotient (G t) (enlarged_scale m G)))
        (fun m _ _ => 0 < eps /\ nonzero m) _.
Next Obligation.
  intros T F eps m y' G' [P N]; extensionality t; set (c := 1 + sum (fun t => mean_square (quotient (G' t) m))).
  assert (mean_square (quotient (G' t) m) < c /\ 1 <= c) as [L O].
  { pose proof (over_nonneg members (fun t => mean_square (quotient (G' t) m)) (fun _ => mean_square_nonneg _)) as A.
    unfold c, sum; split; [| lra]. pose proof (every t) as B; induction members as [| a l IH]; [destruct B |].
    simpl in *; pose proof (mean_square_nonneg (quotient (G' a) m)).
    pose proof (over_nonneg l (fun t => mean_square (quotient (G' t) m)) (fun _ => mean_square_nonneg _)).
    destruct B as [-> | B]; [lra | specialize (IH ltac:(lra) B); lra]. }
  assert (quotient (G' t) (enlarged_scale m G') = scale (/ c) (quotient (G' t) m)) as E.
  { change (enlarged_scale m G') with (scale c m); extensionality i; unfold quotient, scale; field; split; [apply N | lra]. }
  rewrite rms_ball; auto.
  - change (enlarged_scale m G') with (scale c m); extensionality i; unfold times, quotient, scale; field; split; [apply N | lra].
  - rewrite E, mean_square_scale. apply Rmult_lt_reg_l with (c * c); [nra |].
    replace (c * c * (/ c * / c * mean_square (quotient (G' t) m))) with (mean_square (quotient (G' t) m)) by (field; lra).
    nra.
Qed.
End Routes.

(** O-normalised, O-centred and their joint forms: put(m, g(x)), by a route; the parameters are those of g and the scale. *)
Program Definition O_normalised {P Q M X Y Z} (s : storage Q M) (r : route M Y Z) (g : output P X Y) :
  output (P * Q) X Z :=
  Output (fun p x => put r (held s (snd p)) (output_at g (fst p) x))
    (fun p x w => open r (held s (snd p)) (output_at g (fst p) x) w /\
       output_can g (fst p) x (before r (held s (snd p)) (output_at g (fst p) x) w))
    (fun p x w => (output_move g (fst p) x (before r (held s (snd p)) (output_at g (fst p) x) w),
       store s (new_scale r (held s (snd p)) (output_at g (fst p) x) w))) _.
Next Obligation.
  intros P Q M X Y Z s r g p x w [A B]; cbn [fst snd]; rewrite (output_ok g), held_store by assumption.
  now apply route_ok.
Qed.
Program Definition T_normalised {P Q A M X Y Z} (s : storage Q M) (r : route M Y Z) (c : through P A X Y) :
  through (P * Q) A X Z :=
  Through (fun p x => put r (held s (snd p)) (through_at c (fst p) x)) (fun p => inside c (fst p))
    (fun p z z' w => open r (held s (snd p)) (through_at c (fst p) z') w /\
       through_can c (fst p) z z' (before r (held s (snd p)) (through_at c (fst p) z') w))
    (fun p z z' w => (through_move c (fst p) z z' (before r (held s (snd p)) (through_at c (fst p) z') w),
       store s (new_scale r (held s (snd p)) (through_at c (fst p) z') w))) _ _.
Next Obligation. intros P Q A M X Y Z s r c p z z' w [B D]; now apply (inside_ok c). Qed.
Next Obligation.
  intros P Q A M X Y Z s r c p z z' w [B D]; cbn [fst snd]; rewrite (through_ok c), held_store by assumption.
  now apply route_ok.
Qed.

(** ** 9. Joint solutions: when there is one, and which is the least *)

Section Joint.
Context {T O I : Type} `{Finite T} `{Finite I}.
Variable z : T -> vec I.

(** A vector depends on the columns z_t, or there is a direction that sees it and none of them. *)
Lemma span_or_normal (l : list T) : NoDup l -> forall x : vec I,
  (exists c, forall i, x i = sum_over l (fun t => c t * z t i)) \/
  (exists r, (forall t, In t l -> dot r (z t) = 0) /\ dot r x <> 0).
Proof.
  induction 1 as [| a l A N IH]; intro x.
  - destruct (zero_or_not x) as [-> | D]; [left; now exists (fun _ => 0) | right].
    exists x; split; [intros t [] | now apply dot_self].
  - destruct (IH (z a)) as [[c C] | [r [R0 Ra]]].
    + destruct (IH x) as [[e E] | [r [R0 Rx]]]; [left | right].
      * exists (fun t => if same a t then 0 else e t); intro i; simpl; destruct (same a a); [| congruence].
        rewrite E, Rmult_0_l, Rplus_0_l. clear - A; induction l as [| b l IH]; simpl in *; auto.
        rewrite IH by tauto; destruct (same a b); [subst; tauto | auto].
      * exists r; split; auto; intros t [<- | L]; auto.
        unfold dot; rewrite (sum_ext _ (fun i => sum_over l (fun t => c t * (r i * z t i)))).
        -- unfold sum; rewrite over_swap; apply over_zero; intros t L.
           rewrite over_scale; change (sum_over members (fun i => r i * z t i)) with (dot r (z t)).
           rewrite R0 by auto; ring.
        -- intro i; rewrite C, <- over_scale; apply over_ext; intro; ring.
    + destruct (IH (fun i => x i + - (dot r x / dot r (z a)) * z a i)) as [[e E] | [p [P0 Px]]]; [left | right].
      * exists (fun t => if same a t then dot r x / dot r (z a) else e t); intro i; simpl.
        destruct (same a a); [| congruence].
        replace (sum_over l _) with (sum_over l (fun t => e t * z t i)); [rewrite <- E; ring |].
        clear - A; induction l as [| b l IH]; simpl in *; auto.
        rewrite IH by tauto; destruct (same a b); [subst; tauto | auto].
      * assert (S : forall y, dot (fun i => p i + - (dot p (z a) / dot r (z a)) * r i) y
                   = dot p y - dot p (z a) / dot r (z a) * dot r y).
        { intro y; rewrite dot_add_l, dot_scale_l; ring. }
        exists (fun i => p i + - (dot p (z a) / dot r (z a)) * r i); split.
        -- intros t [<- | L]; rewrite S; [field; auto | rewrite (P0 t L), (R0 t L); ring].
        -- rewrite S; intro Q; apply Px. rewrite <- Q; unfold dot at 1.
           rewrite (sum_ext _ (fun i => p i * x i + - (dot r x / dot r (z a)) * (p i * z a i)));
             [| intro; ring]. rewrite sum_add, sum_scale; fold (dot p x) (dot p (z a)); field; auto.
Qed.

(** Joint I-linear and O-linear: dependent columns need dependent targets, and that is all that is needed. *)
Theorem dependent_columns (delta : T -> vec O) :
  (exists V : mat O I, forall t, apply V (z t) = delta t) <->
  (forall c : T -> R, (forall i, sum (fun t => c t * z t i) = 0) -> forall o, sum (fun t => c t * delta t o) = 0).
Proof.
  split.
  - intros [V E] c C o; rewrite (sum_ext _ (fun t => c t * dot (V o) (z t)))
      by (intro; now rewrite <- E).
    unfold dot; rewrite (sum_ext _ (fun t => sum (fun i => V o i * (c t * z t i))))
      by (intro; rewrite <- sum_scale; apply sum_ext; intro; ring).
    rewrite sum_swap; apply sum_zero; intro; rewrite sum_scale, C; ring.
  - intro D; assert (exists V : mat O I, forall t, In t members -> apply V (z t) = delta t) as [V E].
    2: exists V; intro; apply E, every.
    unfold sum in D; pose proof (@once T _) as N; revert D.
    induction N as [| a l A N IH]; intro D; [exists (fun _ => zero); intros t [] |].
    assert (X : forall c k (f : T -> R), sum_over (a :: l) (fun t => (if same a t then k else c t) * f t)
              = k * f a + sum_over l (fun t => c t * f t)).
    { intros c k f; simpl; destruct (same a a); [f_equal | congruence].
      clear - A; induction l as [| b l IH]; simpl in *; auto.
      rewrite IH by tauto; destruct (same a b); [subst; tauto | auto]. }
    destruct IH as [V E].
    { intros c C o; pose proof (D (fun t => if same a t then 0 else c t)) as Q; setoid_rewrite X in Q.
      rewrite <- (Q ltac:(intro; rewrite C; ring) o); ring. }
    destruct (span_or_normal l N (z a)) as [[c C] | [r [R0 Ra]]].
    + exists V; intros t [<- | L]; auto. extensionality o; unfold apply, dot.
      rewrite (sum_ext _ (fun i => sum_over l (fun t => c t * (V o i * z t i))))
        by (intro; rewrite C, <- over_scale; apply over_ext; intro; ring).
      unfold sum; rewrite over_swap.
      pose proof (D (fun t => if same a t then -1 else c t)) as Q; setoid_rewrite X in Q.
      specialize (Q ltac:(intro; rewrite <- C; ring) o).
      transitivity (sum_over l (fun t => c t * delta t o)); [| lra].
      clear - E; induction l as [| b l IH]; simpl in *; auto. rewrite IH by auto; f_equal.
      rewrite over_scale; f_equal; rewrite <- (E b) by auto; reflexivity.
    + exists (rank_one V (fun o => delta a o - apply V (z a) o) (scale (/ dot r (z a)) r)).
      intros t [<- | L]; rewrite rank_one_at; extensionality o; unfold scale; rewrite dot_scale_l.
      * field; auto.
      * rewrite (R0 t L), Rmult_0_r, Rmult_0_r, Rplus_0_r; now rewrite E.
Qed.

(** The normal equations: a change whose rows are combinations of the columns is the least of all that do the same. *)
Theorem least_norm (m : T -> R) (v v' : vec I) :
  (forall i, v i = sum (fun t => m t * z t i)) -> (forall t, dot v' (z t) = dot v (z t)) ->
  dot v' v' = dot v v + dot (sub v' v) (sub v' v).
Proof.
  intros M E; assert (dot v (sub v' v) = 0) as Q.
  { unfold dot; rewrite (sum_ext _ (fun i => sum (fun t => m t * (sub v' v i * z t i)))).
    - rewrite sum_swap; apply sum_zero; intro t; rewrite sum_scale; fold (dot (sub v' v) (z t)).
      replace (dot (sub v' v) (z t)) with (dot v' (z t) - dot v (z t)); [rewrite E; ring |].
      unfold dot; unfold Rminus; rewrite <- Rmult_1_l with (r := - _) at 1.
      rewrite <- Ropp_mult_distr_r, Ropp_mult_distr_l, <- sum_scale, <- sum_add; apply sum_ext; intro; simpl; ring.
    - intro; rewrite M, Rmult_comm, <- sum_scale; apply sum_ext; intro; ring. }
  rewrite <- (Rplus_0_r (_ + _)), <- (Rmult_0_r 2), <- Q. unfold dot.
  rewrite <- sum_scale, <- !sum_add; apply sum_ext; intro; simpl; ring.
Qed.
End Joint.

(** Farkas: [lambda] shows that no positive s solves A s = q, so that no scale keeps every token's RMS. *)
Theorem farkas {T I} `{Finite T} `{Finite I} (A : T -> I -> R) (q lambda : T -> R) :
  (forall i, 0 <= sum (fun t => lambda t * A t i)) -> sum (fun t => lambda t * q t) <= 0 ->
  (exists i, 0 < sum (fun t => lambda t * A t i)) \/ sum (fun t => lambda t * q t) < 0 ->
  ~ exists s : I -> R, (forall i, 0 < s i) /\ forall t, sum (fun i => A t i * s i) = q t.
Proof.
  intros P Q S (s & Z & E).
  assert (sum (fun t => lambda t * q t) = sum (fun i => s i * sum (fun t => lambda t * A t i))) as X.
  { rewrite (sum_ext (fun t => lambda t * q t) (fun t => sum (fun i => s i * (lambda t * A t i)))).
    - rewrite sum_swap; apply sum_ext; intro; apply sum_scale.
    - intro t; rewrite <- E, <- sum_scale; apply sum_ext; intro; ring. }
  assert (forall i, 0 <= s i * sum (fun t => lambda t * A t i)) as N.
  { intro i; apply Rmult_le_pos; [left; apply Z | apply P]. }
  destruct S as [[i L] | L].
  - assert (0 < sum (fun i => s i * sum (fun t => lambda t * A t i))); [| lra].
    apply (over_positive members _ i N (every i)), Rmult_lt_0_compat; auto.
  - assert (0 <= sum (fun i => s i * sum (fun t => lambda t * A t i))) by apply (over_nonneg members _ N); lra.
Qed.

(** ** 10. Many layers (Theorem 2) *)

(** A layer of the sweep: its block, its weights, what mixes the positions of the source run before it, and the state that
    the target run brings to it. Blocks may differ in everything but the kind of state between them. *)
Record stage (S : Type) := Stage {
  params : Type; state : Type; block_of : input params state S; weights_of : params; mixes : S -> state; goal : state }.
Arguments params {S}. Arguments state {S}. Arguments block_of {S}.
Arguments weights_of {S}. Arguments mixes {S}. Arguments goal {S}.
Definition target_after {S} (k : stage S) : S := input_at (block_of k) (weights_of k) (goal k).
Definition patched_after {S} (k : stage S) (x : S) : S :=
  input_at (block_of k) (input_move (block_of k) (weights_of k) (mixes k x) (goal k)) (mixes k x).
(** The states of the patched source run, and of the target run, layer by layer. *)
Fixpoint patched_run {S} (x : S) (l : list (stage S)) : list S :=
  match l with nil => nil | k :: l => patched_after k x :: patched_run (patched_after k x) l end.
Fixpoint all_open {S} (x : S) (l : list (stage S)) : Prop :=
  match l with
  | nil => True
  | k :: l => input_can (block_of k) (weights_of k) (mixes k x) (goal k) /\ all_open (patched_after k x) l
  end.
Theorem theorem_2 {S} (l : list (stage S)) (x : S) : all_open x l -> patched_run x l = List.map target_after l.
Proof.
  revert x; induction l as [| k l IH]; intros x A; simpl in *; [auto | destruct A as [A B]].
  rewrite (IH _ B); f_equal; now apply input_ok.
Qed.

(** ** 11. Refusals *)

(** What ends in a bounded map reaches nothing beyond the bound; what ends in a constant reaches nothing else. *)
Theorem bounded_refusal {P X I} (c : R) (f : P -> X -> vec I) (w : vec I) :
  (forall p x i, Rabs (f p x i) <= c) -> (exists i, c < Rabs (w i)) -> ~ exists p x, f p x = w.
Proof. intros B [i L] (p & x & E); specialize (B p x i); rewrite E in B; lra. Qed.
Theorem constant_refusal {P X Y} (k : Y) (f : P -> X -> Y) (w : Y) :
  (forall p x, f p x = k) -> w <> k -> ~ exists p x, f p x = w.
Proof. intros C N (p & x & E); apply N; now rewrite <- E. Qed.

(** ** 12. Activations, and other maps without parameters that move *)

Definition sigmoid (x : R) : R := / (1 + exp (- x)).
Definition silu (x : R) : R := x * sigmoid x.
Definition swish (a x : R) : R := x * sigmoid (x * a).
Definition relu (x : R) : R := (x + Rabs x) / 2.
Definition relu2 (x : R) : R := relu x * relu x.
Definition gelu_tanh (x : R) : R := x / 2 * (1 + tanh (sqrt (2 / PI) * (x + 44715 / 1000000 * x * x * x))).
Definition quick_gelu (x : R) : R := x * sigmoid (x * (1702 / 1000)).
Definition identity (x : R) : R := x.
Definition relu6 (x : R) : R := relu x - relu (x - 6).
Definition leaky_relu (x : R) : R := relu x - relu (- x) / 100.
Definition hardswish (x : R) : R := x * (relu (x + 3) - relu (x - 3)) / 6.
Definition mish (x : R) : R := x * sigmoid x * (1 + sigmoid (- x)) / (1 + sigmoid (- x) * sigmoid (- x)).
(** The error function may be any function: a certificate takes it as it comes. *)
Definition gelu (erf : R -> R) (x : R) : R := x / 2 * (1 + erf (x / sqrt 2)).
Fixpoint polynomial (c : list R) (x : R) : R := match c with nil => 0 | a :: c => a + polynomial c x * x end.
Definition gelu_10 (erf : R -> R) (x : R) : R := gelu erf x - relu (gelu erf x - 10).
Definition laplace (erf : R -> R) (x : R) : R := (1 + erf ((x - 707107 / 1000000) / (282095 / 1000000) / sqrt 2)) / 2.
(** So may the soft-plus. *)
Definition sqrtsoftplus (softplus : R -> R) (x : R) : R := sqrt (softplus x).
Definition xielu (softplus : R -> R) (p n b e x : R) : R :=
  if Rlt_dec 0 x then softplus p * x * x + b * x
  else (exp (Rmin x e) - 1 - x) * (b + softplus n) + b * x.
Definition at_most (c x : R) : R := Rmin x c.
Definition at_least (c x : R) : R := Rmax x c.
(** What stands more than c standard deviations above the mean. *)
Definition above_mean {I} `{Finite I} (c : R) (x : vec I) : vec I :=
  fun i => relu (centred x i - c * sqrt (mean_square (centred x))).
Definition clamp (c x : R) : R := Rmax (Rmin x c) (- c).

(** Fused halves of one vector; where the two are interleaved in storage, the halves are its even and its odd entries. *)
Definition first {I} (x : vec (I + I)) : vec I := fun i => x (inl i).
Definition second {I} (x : vec (I + I)) : vec I := fun i => x (inr i).
Definition evens {I} : vec (I + I) -> vec I := first.
Definition odds {I} : vec (I + I) -> vec I := second.
(** One number for all entries. *)
Definition spread {I} (x : vec unit) : vec I := fun _ => x tt.
Definition one_less {I} (x : vec I) : vec I := fun i => 1 - x i.

Lemma tanh_bounded x : Rabs (tanh x) <= 1.
Proof.
  unfold tanh, sinh, cosh; pose proof (exp_pos x); pose proof (exp_pos (- x)).
  apply Rabs_le; split; apply Rmult_le_reg_r with ((exp x + exp (- x)) / 2); try lra; field_simplify; lra.
Qed.
Lemma sigmoid_bounded x : Rabs (sigmoid x) <= 1.
Proof.
  unfold sigmoid; pose proof (exp_pos (- x)); rewrite Rabs_inv, Rabs_pos_eq by lra.
  rewrite <- Rinv_1; apply Rinv_le_contravar; lra.
Qed.
Lemma soft_cap_bounded {I} c (x : vec I) i : 0 < c -> Rabs (soft_cap c x i) <= c.
Proof.
  intro P; unfold soft_cap, map; rewrite Rabs_mult, (Rabs_pos_eq c) by lra; pose proof (tanh_bounded (x i / c)); nra.
Qed.
Lemma positive_ratio (n d : positive) : 0 < IZR (Zpos n) / IZR (Zpos d).
Proof. apply Rdiv_lt_0_compat; now apply IZR_lt. Qed.
Lemma nonzero_ratio (n d : positive) : IZR (Zpos n) / IZR (Zpos d) <> 0.
Proof. apply Rgt_not_eq, positive_ratio. Qed.
Lemma nonzero_ratio_neg (n d : positive) : IZR (Zneg n) / IZR (Zpos d) <> 0.
Proof.
  apply Rmult_integral_contrapositive_currified; [now apply Rlt_not_eq, IZR_lt |].
  apply Rinv_neq_0_compat, Rgt_not_eq; now apply IZR_lt.
Qed.
