"""Deliberately wrong rules: one altered construction each, and a block whose proof uses the rule."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controllability.arrays import arithmetic, dot
from controllability.components import (
    Activation,
    Bias,
    Collapse,
    Correction,
    ExpertLinear,
    Gate,
    InverseRms,
    Joined,
    Linear,
    Mixture,
    NormalizeEach,
    Product,
    Routing,
    Scale,
    Select,
    SoftCap,
    Spread,
    Streams,
    Sum,
    Taps,
    Times,
    Window,
    gated,
    layer_norm,
    residual,
    rms_norm,
    updates,
)  # fmt: skip
from controllability.deltas import ExpertLowRank, LowRank, Shift
from controllability.interfaces import Component, Param
from controllability.rules import (
    centred,
    collapse,
    construct,
    input_side,
    mixture,
    normalised,
    output_side,
    theorems,
    through,
)
from controllability.rules.base import rest_of_sum, target_output
from controllability.solvers import centred_scale, norm_scale as routes

up, gate = Linear(Param("up", ("h", "d"))), Linear(Param("gate", ("h", "d")))
down = Linear(Param("down", ("d", "h")))
biased = Linear(Param("down", ("d", "h")), Param("b", ("d",)))
wide = Linear(Param("up", ("h", "d")), Param("c", ("h",)))
square = Linear(Param("W", ("d", "d")))
silu = Activation("silu")
LLAMA = residual(rms_norm("pre") >> gated(gate, up, silu) >> down)
CENTRED = residual(up >> silu >> down >> layer_norm("post", bias=False))
POST = residual(gated(gate, up, silu) >> down >> rms_norm("post", offset=1))
EXPERTS = residual(
    Mixture(
        Linear(Param("R", ("E", "d"))), Routing(2), ExpertLinear(Param("U", ("E", "h", "d"))) >> silu,
        ExpertLinear(Param("V", ("E", "d", "h"))),
    )
)  # fmt: skip
TURNED = residual(replace(EXPERTS.terms[1], last=ExpertLinear(Param("V", ("E", "h", "d")), layout="in_out")))
PLANES, ROUTED = ExpertLowRank.dense, ExpertLowRank.routed
# the mixture stands before the outer function: it is steered on the input side
INNER_EXPERTS = residual(EXPERTS.terms[1] >> rms_norm("between") >> square)
SHARED = residual(rms_norm("pre") >> Sum((up >> silu >> down, EXPERTS.terms[1])))
LAST = residual(rms_norm("pre") >> Sum((EXPERTS.terms[1], up >> silu >> down)))
TWO = residual(Sum((gate >> silu >> down, up >> silu >> Linear(Param("down2", ("d", "h"))))))


# several streams collapsed, each normalised before, one corrected (AltUp); a convolution behind the half; a factor without parameters
SPREAD = Spread(Select(0, "S", "4d") >> Streams(4), Select(1, "b", 4), Select(2, "x") >> up >> silu >> down)
COLLAPSED = Collapse(SPREAD, Joined() >> Linear(Param("P", (4, "4d"))) >> Activation("sigmoid"), 0.5)
WEIGHED = Joined() >> Linear(Param("U", ("2d", "2d"))) >> Activation("sigmoid") >> Streams(2)
MIXED = Collapse(NormalizeEach(2) >> Scale(Param("m", ("2d",))) >> Streams(2), WEIGHED)
CORRECTED = Correction(
    Select(0, "p"), Select(1, "x") >> square, Linear(Param("g", (3, "d"))) >> Times(0.0625) >> Activation("tanh")
)
CONVOLVED = Sum((Select(0, "r"), Select(1, "u") >> Window(2) >> Taps(Param("c", ("d", 1, 2)), 1, 0.5)))
SIZED = residual(Product((up, InverseRms())) >> silu >> down)
ASKED, TAPPED = Collapse.asked, Taps._solved


@dataclass(frozen=True)
class Mutation:
    """What is replaced by what (``object.attribute``), and the rule of ``block``'s proof that must fail."""

    rule: str
    target: Any
    attribute: str
    wrong: Callable[..., Any]
    block: Component
    options: tuple[tuple[str, Any], ...] = ()


def rank_one(left: Callable[..., Any], right: Callable[..., Any], flip: bool = False) -> Callable[..., Any]:
    """A wrong rank-1 construction: left and right factors from (x, gap)."""

    def wrong(x: Any, gap: Any, transposed: bool) -> LowRank:
        return LowRank(left(x, gap)[..., None, :], right(x, gap)[..., None, :], transposed != flip)

    return wrong


def plain_left(x: Any, gap: Any) -> Any:
    return gap


def plain_right(x: Any, gap: Any) -> Any:
    return x / dot(x, x)


def root(x: Any) -> Any:
    return arithmetic(x).sqrt(x)


def expert_rank_one(change: Callable[..., Any]) -> Callable[..., Any]:
    """The experts' construction with its delta changed."""
    plain = updates.expert_change
    return lambda index, x, *given: change(plain(index, x, *given), x)


def moved(wrong: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong Δm from (the scale, its parameters, the right change)."""
    return lambda self, params, change: Shift(wrong(self, params, change))


def other_rest(combine: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong remainder of a sum from (run, wanted value, outlets of the other terms)."""

    def rest_of(step: Any, moved: Any, run: Any, wanted: Any) -> Any:
        inside = moved.place.outlet[: len(step.place.path) + 1]
        others = [part.outlet for part in step.place.parts() if part.path != inside]
        return lambda: combine(run, wanted(), others)

    return rest_of


def added_up(run: Any, value: Any, others: Any) -> Any:
    for outlet in others:
        value = value + run.output(outlet)
    return value


def of_the_target(run: Any, value: Any, others: Any) -> Any:
    """The classic: s(v') instead of s(v), so that the change of the skip is forgotten."""
    for outlet in others:
        value = value - run.target.output(outlet)
    return value


def only_first(self: Any, step: Any, run: Any, wanted: Any) -> None:
    construct(step.premises[0], run, target_output(step.premises[0], run))


def asks_for_the_whole(self: Any, step: Any, run: Any, wanted: Any) -> None:
    for premise in step.premises:
        construct(premise, run, wanted)


def asks_for_the_source(self: Any, step: Any, run: Any, wanted: Any) -> None:
    premise = step.premises[0]
    construct(premise, run, lambda: run.unpatched.output(premise.place.outlet))


def negated(self: Any, step: Any, run: Any, wanted: Any) -> None:
    construct(step.premises[0], run, lambda: wanted() * -1)


def outer_repeats_the_target(self: Any, step: Any, run: Any, wanted: Any) -> None:
    """Theorem 1 without δ = s(v') − s(v)."""
    for premise in step.premises:
        construct(premise, run, target_output(premise, run))


def asked(change: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong output of the carrier, from (component, weights, value, what is right)."""

    def wrong(self: Any, wanted: Any, weights: Any, value: Any) -> Any:
        return change(self, weights, value, ASKED(self, wanted, weights, value))

    return wrong


def weights_of_the_source(self: Any, step: Any, run: Any, wanted: Any) -> None:
    """The weights are moved to the target's, and the carrier is asked for what would be right without that."""
    carried, weighted = step.premises
    construct(weighted, run, target_output(weighted, run))
    value = lambda path: run.output(path)  # noqa: E731
    construct(carried, run, lambda: step.place.component.asked(wanted(), run.unpatched.output((1,)), value))


def swapped(self: Any, step: Any, run: Any, wanted: Any) -> None:
    """The inner function is asked for what the outer one must give, and the other way round."""
    inner, outer = step.premises
    construct(inner, run, rest_of_sum(step, outer, run, wanted))
    construct(outer, run, target_output(outer, run))


def candidate(**changes: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong route: fields of the right answer changed, as functions of (answer, G, m, y, ε)."""
    plain = routes.candidate

    def wrong(route: str, G: Any, m: Any, y: Any, eps: Any, stored: Any) -> Any:
        answer = plain(route, G, m, y, eps, stored)
        return replace(answer, **{name: change(answer, G, m, y, eps) for name, change in changes.items()})

    return wrong


def mean_square(x: Any) -> Any:
    return arithmetic(x).mean(x * x)


def wrong_secular(form: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong (m', u) for a given μ, which still fulfils the papers' equation mean(u²) = q."""

    def secular(xp: Any, G: Any, m: Any, q: Any) -> Any:
        mu = xp.root("mu", lambda mu: xp.mean((G * m / (m * m - mu)) ** 2), q)
        return form(G, m, mu)

    return secular


def equation(of: Callable[..., Any]) -> Callable[..., Any]:
    """The scale as it is, with an equation that would make it right."""

    def secular(xp: Any, G: Any, m: Any, q: Any) -> Any:
        xp.root("mu", lambda mu: of(xp, G, m, mu), q)
        return m + G * 0, G / m

    return secular


def unscaled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The scale's delta taken as the new scale itself: m is forgotten."""
    return lambda self: Shift(self.answer.scale)


def output_mixture(weigh: Callable[..., Any], missing: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong O-mixture: weights of the experts from (shares, activations), what is missing from (goal, raw, shares)."""

    def wrong(self: Any, step: Any, run: Any, wanted: Any) -> None:
        path = (*step.place.path, step.place.start + 2)

        def gap() -> Any:
            y, raw, goal = run.input(path), run.raw(path), wanted()
            share = mixture.shares_of(step.place.component, run.params_at(path), y)
            return weigh(share, y) * missing(goal, raw, share)[..., None, :]

        run.steer(path, mixture.Goal(step.update, delta=gap))

    return wrong


def right_weight(share: Any, y: Any, power: int = 2) -> Any:
    size = share**power * dot(y, y)
    return size / size.sum(-2)[..., None, :] / share


def right_missing(goal: Any, raw: Any, share: Any) -> Any:
    return goal - (raw * share).sum(-2)


def balanced(scale: Any) -> Any:
    """A wrong scale of the balanced route, of the right weights w."""

    def wrong(xp: Any, G: Any, m: Any, q: Any) -> Any:
        usual = xp.name(xp.mean(m * m) / xp.sqrt(xp.mean(G * G)))
        return scale(xp, G, xp.name(m * m + xp.magnitude(G) * usual), q) * m / xp.magnitude(m)

    return wrong


def uncentred(G: Any, m: Any, y: Any, eps: Any, stored: Any) -> Any:
    """The scale of the RMS normalisation, whose u has a mean."""
    xp = arithmetic(y)
    return routes.candidate("balanced", G, m, y - xp.mean(y), eps, stored), None


def centred_without_epsilon(G: Any, m: Any, y: Any, eps: Any, stored: Any) -> Any:
    xp = arithmetic(y)
    answer, margin = centred_scale.centred(G, m, y, eps, stored)
    return replace(answer, before=answer.unit * root(mean_square(y - xp.mean(y)))), margin


OUT, BALL, SCALE = (("via", "output"),), (("via", "output"), ("route", "ball")), (("route", "scale"),)
UNIFORM, SECULAR, BALANCED = (("route", "uniform"),), (("route", "secular"),), (("route", "balanced"),)
NO_DOWN = (("frozen", ("down",)),)
CAPPED = residual(square >> SoftCap(30.0))
MUTATIONS = {
    # rank-1 patches of a linear map
    "linear: sign": Mutation("I-linear", updates, "rank_one_change", rank_one(lambda x, g: -g, plain_right), LLAMA),
    "linear: norm not squared": Mutation("I-linear", updates, "rank_one_change", rank_one(plain_left, lambda x, g: x / root(dot(x, x))), LLAMA),
    "linear: norm forgotten": Mutation("O-linear", updates, "rank_one_change", rank_one(plain_left, lambda x, g: x), LLAMA),
    "linear: squared norm squared again": Mutation("O-linear", updates, "rank_one_change", rank_one(plain_left, lambda x, g: x / dot(x, x) ** 2), LLAMA),
    "linear: ε added to the norm": Mutation("I-linear", updates, "rank_one_change", rank_one(plain_left, lambda x, g: x / (dot(x, x) + 1e-8)), LLAMA),
    "linear: norm of the gap": Mutation("I-linear", updates, "rank_one_change", rank_one(plain_left, lambda x, g: x / dot(g, g)), LLAMA),
    "linear: wrong vector": Mutation("I-linear", updates, "rank_one_change", rank_one(plain_left, lambda x, g: (x + 1) / dot(x, x)), LLAMA),
    "linear: factors exchanged": Mutation("I-linear", updates, "rank_one_change", rank_one(lambda x, g: x / dot(x, x), lambda x, g: g), LLAMA),
    "linear: stored transposed": Mutation("O-linear", updates, "rank_one_change", rank_one(plain_left, plain_right, flip=True), LLAMA),
    "linear: half the gap": Mutation("O-linear", updates, "rank_one_change", rank_one(lambda x, g: g / 2, plain_right), LLAMA),
    # biases and scales
    "bias of a linear map: sign": Mutation("O-bias", updates, "offset_change", lambda x, g: Shift(-g), residual(up >> silu >> biased), NO_DOWN),
    "bias of a linear map, input side: doubled": Mutation("I-bias", updates, "offset_change", lambda x, g: Shift(g + g), residual(wide >> silu >> down), (("frozen", ("up",)),)),
    "bias: what is wanted, not what is missing": Mutation("O-bias", updates, "offset_change", lambda x, g: Shift(g + x), residual(up >> silu >> down >> Bias(Param("b", ("d",)))), NO_DOWN),
    "scale: times instead of divided": Mutation("O-scale", updates, "quotient", lambda x, g: g * x, POST, SCALE),
    "scale: upside down": Mutation("O-scale", updates, "quotient", lambda x, g: x / g, POST, SCALE),
    "scale: m forgotten": Mutation("O-scale", Scale, "moved", moved(lambda s, p, c: c - s.effective(p)), POST, SCALE),
    "scale, input side: offset forgotten": Mutation("I-scale", Scale, "moved", moved(lambda s, p, c: c + s.effective(p)), residual(rms_norm("pre", offset=1) >> silu >> down)),
    # experts
    "experts: sign": Mutation("I-experts", updates, "expert_change", expert_rank_one(lambda d, x: replace(d, left=-d.left)), EXPERTS),
    "experts: norm forgotten": Mutation("I-experts", updates, "expert_change", expert_rank_one(lambda d, x: replace(d, right=d.right * dot(x, x)[..., None, :])), EXPERTS),
    "experts: one expert for all": Mutation("I-experts", updates, "expert_change", expert_rank_one(lambda d, x: replace(d, index=d.index[..., :1])), EXPERTS),
    "experts, as stored: sign": Mutation("I-experts", ExpertLowRank, "dense", lambda self: -PLANES(self), EXPERTS),
    "experts, as stored: every change to the first": Mutation("T-mixture", ExpertLowRank, "dense", lambda self: PLANES(replace(self, index=self.index * 0)), EXPERTS),
    "experts, as stored: rows for columns": Mutation("O-mixture", ExpertLowRank, "dense", lambda self: PLANES(self) if not self.transposed else PLANES(replace(self, transposed=False)).swapaxes(-1, -2) * 2, TURNED, OUT),
    "experts, as computed: doubled": Mutation("O-mixture", ExpertLowRank, "routed", lambda self, x, index: ROUTED(self, x, index) * 2, EXPERTS, OUT),
    "mixture: gate sum taken as 1": Mutation("O-mixture", mixture.OutputMixture, "construct", output_mixture(lambda s, y: s * 0 + 1, right_missing), EXPERTS, OUT),
    "mixture: shares not divided out": Mutation("O-mixture", mixture.OutputMixture, "construct", output_mixture(lambda s, y: right_weight(s, y) * s, right_missing), EXPERTS, OUT),
    "mixture: shares forgotten in the sum": Mutation("T-mixture", mixture.OutputMixture, "construct", output_mixture(right_weight, lambda g, r, s: g - r.sum(-2)), EXPERTS),
    "mixture: raw output forgotten": Mutation("T-mixture", mixture.OutputMixture, "construct", output_mixture(right_weight, lambda g, r, s: g), EXPERTS),
    "mixture: shares not squared": Mutation("O-mixture", mixture.OutputMixture, "construct", output_mixture(lambda s, y: s * dot(y, y) / (s * s * dot(y, y)).sum(-2)[..., None, :] / s, right_missing), EXPERTS, OUT),
    "mixture, input side: only the router": Mutation("I-mixture", mixture.InputMixture, "construct", only_first, INNER_EXPERTS),
    "mixture, input side: asked for the whole": Mutation("I-mixture", mixture.InputMixture, "construct", asks_for_the_whole, INNER_EXPERTS),
    # input side
    "before: asked for the source": Mutation("I-before", input_side.InputBefore, "construct", asks_for_the_source, LLAMA),
    "after: asked for what comes after q": Mutation("I-after", input_side.InputAfter, "construct", asks_for_the_whole, LLAMA),
    "combine: only the first": Mutation("I-combine", input_side.InputCombine, "construct", only_first, LLAMA),
    "combine: each asked for the whole": Mutation("I-combine", input_side.InputCombine, "construct", asks_for_the_whole, LLAMA),
    # the theorems
    "theorem 1: others added": Mutation("theorem-1", theorems, "rest_of_sum", other_rest(added_up), LLAMA),
    "theorem 1: others forgotten": Mutation("theorem-1", theorems, "rest_of_sum", other_rest(lambda run, v, others: v), LLAMA),
    "theorem 1: the target's skip": Mutation("theorem-1", theorems, "rest_of_sum", other_rest(of_the_target), LLAMA),
    "theorem 1: δ forgotten": Mutation("theorem-1", theorems.Theorem1, "construct", outer_repeats_the_target, LLAMA),
    "theorem 1: inner and outer exchanged": Mutation("theorem-1", theorems.Theorem1, "construct", swapped, LLAMA),
    "theorem 1b: the target's skip": Mutation("theorem-1b", theorems, "rest_of_sum", other_rest(of_the_target), LLAMA, OUT),
    "theorem 1b: the sum itself": Mutation("theorem-1b", theorems.Theorem1b, "construct", asks_for_the_whole, LLAMA, OUT),
    "no skip: asked for the source": Mutation("I-by-output", theorems.InputByOutput, "construct", asks_for_the_source, Product((Activation("sigmoid"), square)), OUT),
    # output side
    "after fixed: sign": Mutation("O-after-fixed", output_side.OutputAfterFixed, "construct", negated, residual(silu >> down), OUT),
    "sum: others added": Mutation("O-sum", output_side, "rest_of_sum", other_rest(added_up), TWO, OUT),
    "sum: others forgotten": Mutation("O-sum", output_side.OutputSum, "construct", asks_for_the_whole, TWO, OUT),
    "factor: times instead of divided": Mutation("O-factor", output_side.OutputFactor, "construct", negated, residual(Product((Activation("sigmoid"), square))), OUT),
    "soft-cap: its own value": Mutation("O-through-bijection", SoftCap, "invert", lambda self, p, y: self(p, y), CAPPED, OUT),
    "soft-cap: cap forgotten": Mutation("O-through-bijection", SoftCap, "invert", lambda self, p, y: arithmetic(y).arctanh(y / 30), CAPPED, OUT),
    "bias undone: sign": Mutation("O-through-bijection", Bias, "invert", lambda self, p, y: self(p, y), residual(square >> Bias(Param("b", ("d",)))), (*OUT, ("frozen", ("b",)))),
    "scale undone: times": Mutation("O-through-bijection", Scale, "invert", lambda self, p, y: self(p, y), residual(square >> Scale(Param("m", ("d",)))), (*OUT, ("frozen", ("m",)))),
    "gate undone: times": Mutation("O-through-bijection", Gate, "invert", lambda self, p, y: self(p, y), residual(square >> Gate(Param("g", (1,)), "tanh")), OUT),
    "multiplier undone: times": Mutation("O-times", Times, "invert", lambda self, p, y: self(p, y), residual(square >> Times(0.25)), OUT),
    # weights that read what they weigh
    "self-weighted: the weights left alone": Mutation("I-self-weighted", collapse.InputSelfWeighted, "construct", only_first, COLLAPSED),
    "self-weighted: the source's weights": Mutation("I-self-weighted", collapse.InputSelfWeighted, "construct", weights_of_the_source, COLLAPSED),
    "collapse: the streams added": Mutation("I-self-weighted", Collapse, "asked", asked(lambda s, w, v, right: right + v((0, 0)).sum(-2)), COLLAPSED),
    "collapse: the least weight forgotten": Mutation("I-self-weighted", Collapse, "asked", lambda s, *given: ASKED(replace(s, least=0), *given), COLLAPSED),
    "collapse of normed streams: weights not squared": Mutation("I-self-weighted", Collapse, "asked", asked(lambda s, w, v, right: v((0,)) + (right - v((0,))) / w), MIXED),
    "correction: the gain taken as 1": Mutation("I-self-weighted", Correction, "asked", lambda s, wanted, w, v: wanted, CORRECTED),
    "correction: another stream's gain": Mutation("I-self-weighted", Correction, "asked", lambda s, wanted, w, v: v((0,)) + (wanted - v((0,))) / (1 + w[..., 1:2]), CORRECTED),
    "factor, input side: of the source": Mutation("I-factor", output_side.InputFactor, "construct", asks_for_the_source, SIZED),
    # a convolution's taps
    "taps: norm forgotten": Mutation("O-taps", Taps, "_solved", lambda s, p, x, g: Shift(TAPPED(s, p, x, g * dot(x, x)).value), CONVOLVED),
    "taps: factor forgotten": Mutation("O-taps", Taps, "_solved", lambda s, p, x, g: TAPPED(s, p, x, g / 2), CONVOLVED),
    "taps: sign": Mutation("O-taps", Taps, "_solved", lambda s, p, x, g: TAPPED(s, p, x, -g), CONVOLVED),
    # normalised outputs
    "normalised: ε forgotten in y*": Mutation("O-normalised", routes, "candidate", candidate(before=lambda a, G, m, y, eps: a.unit * root(mean_square(y))), POST, UNIFORM),
    "normalised: y* not on the sphere": Mutation("O-normalised", routes, "candidate", candidate(before=lambda a, G, m, y, eps: a.unit), POST, UNIFORM),
    "normalised: the scale as it was": Mutation("O-normalised", routes, "candidate", candidate(scale=lambda a, G, m, y, eps: m), POST, UNIFORM),
    "uniform: q forgotten": Mutation("O-normalised", routes, "candidate", candidate(scale=lambda a, G, m, y, eps: root(mean_square(G / m)) * m), POST, UNIFORM),
    "uniform: RMS of G instead of G/m": Mutation("O-normalised", routes, "candidate", candidate(scale=lambda a, G, m, y, eps: root(mean_square(G)) * m), POST, UNIFORM),
    "balanced: q forgotten": Mutation("O-normalised", routes, "_balanced", balanced(lambda xp, G, w, q: xp.sqrt(xp.mean(G * G / w)) * xp.sqrt(w)), POST, BALANCED),
    "balanced: κ² for κ": Mutation("O-normalised", routes, "_balanced", balanced(lambda xp, G, w, q: xp.mean(G * G / w) / q * xp.sqrt(w)), POST, BALANCED),
    "balanced: w for its root": Mutation("O-normalised", routes, "_balanced", balanced(lambda xp, G, w, q: xp.sqrt(xp.mean(G * G / w) / q) * w), POST, BALANCED),
    "balanced: RMS of G instead of G/√w": Mutation("O-normalised", routes, "_balanced", balanced(lambda xp, G, w, q: xp.sqrt(xp.mean(G * G) / q) * xp.sqrt(w)), POST, BALANCED),
    "balanced: ε forgotten in y*": Mutation("O-normalised", routes, "candidate", candidate(before=lambda a, G, m, y, eps: a.unit * root(mean_square(y))), POST, BALANCED),
    "centred: the scale of the other norm": Mutation("O-centred", centred, "centred", uncentred, CENTRED),
    "centred: ε forgotten in y*": Mutation("O-centred", centred, "centred", centred_without_epsilon, CENTRED),
    "ball: root forgotten": Mutation("O-normalised", routes, "candidate", candidate(before=lambda a, G, m, y, eps: a.unit * eps / (1 - mean_square(a.unit))), POST, BALL),
    "ball: sphere instead of ball": Mutation("O-normalised", routes, "candidate", candidate(before=lambda a, G, m, y, eps: a.unit / (1 - mean_square(a.unit))), POST, BALL),
    "secular: m + μ/m": Mutation("O-normalised", routes, "secular", wrong_secular(lambda G, m, mu: (m + mu / m, G * m / (m * m - mu))), POST, SECULAR),
    "secular: μ not divided by m": Mutation("O-normalised", routes, "secular", wrong_secular(lambda G, m, mu: (m - mu, G * m / (m * m - mu))), POST, SECULAR),
    "secular: an equation without its unknown": Mutation("O-normalised", routes, "secular", equation(lambda xp, G, m, mu: xp.mean((G / m) ** 2)), POST, SECULAR),
    "secular: an equation with something added": Mutation("O-normalised", routes, "secular", equation(lambda xp, G, m, mu: xp.mean((G * m / (m * m - mu)) ** 2) + 1), POST, SECULAR),
    "normalised: Δm is m'": Mutation("O-normalised", normalised.OneToken, "scale_delta", unscaled(normalised.OneToken.scale_delta), POST, UNIFORM),
    # Theorem 1 inside branches
    "through a split: outer repeats the target": Mutation("T-split", through.ThroughSplit, "construct", outer_repeats_the_target, LAST),
    "through a split: outer asked of the inner": Mutation("T-split", through.ThroughSplit, "construct", asks_for_the_whole, LAST),
    "through what is fixed: repeats the target": Mutation("T-before", through.ThroughBefore, "construct", outer_repeats_the_target, SHARED),
    "through a sum: others added": Mutation("T-sum", through, "rest_of_sum", other_rest(added_up), SHARED),
    "through a sum: others forgotten": Mutation("T-sum", through, "rest_of_sum", other_rest(lambda run, v, others: v), SHARED),
    # the delta itself
    "low rank: effect doubled": Mutation("I-linear", LowRank, "effect", lambda self, x: (arithmetic(x).sum(self.right * x[..., None, :]) * self.left).sum(-2) * 2, LLAMA),
    "low rank: dense forgets a sign": Mutation("O-linear", LowRank, "dense", lambda self: -(self.left.swapaxes(-1, -2) @ self.right), LLAMA),
}  # fmt: skip
