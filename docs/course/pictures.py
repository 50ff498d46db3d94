"""The pictures of the course, each computed by the package: ``python docs/course/pictures.py`` writes all of them anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(DOCS))

from course.drawing import Picture  # noqa: E402

CONTEXT, QUESTION = "Mia lives in Oslo .", "Where does Mia live ?"


def lesson_1() -> Picture:
    """One question in three runs of the embedded model: without the context, with it, and without it but patched."""
    import controllability as ct

    model, tokenizer = ct.load_model("embedded")
    target, source = ct.encode(tokenizer, CONTEXT, QUESTION)
    patch = ct.patch_model(model, target, source)
    plain = [_states(model, tokenizer, inputs) for inputs in (source, target)]
    with patch.applied(model):
        patched = _states(model, tokenizer, source)
    picture = Picture("One question in three runs: without the context, with it, and patched", 390)
    heads = "without the context", "with the context", "without, but patched"
    for i, (head, (state, out, word)) in enumerate(zip(heads, (*plain, patched), strict=True)):
        _run(picture, 8 + 158 * i, head, i, state, out, word)
    return picture


def _states(model: Any, tokenizer: Any, inputs: Any) -> tuple[list[float], list[float], str]:
    """At the last token: what the first layer's feed-forward half reads, what that layer gives, and the next word."""
    import torch

    seen: list[Any] = []
    layer = model.model.layers[0]
    hooks = [
        layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        layer.register_forward_hook(lambda *args: seen.append(args[-1])),
    ]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    for hook in hooks:
        hook.remove()
    state, out = ((one[0] if isinstance(one, tuple) else one)[0, -1, :12].tolist() for one in seen)
    return state, out, tokenizer.decode(logits.argmax())


def _tokens(picture: Picture, x: float, y: float, words: str, name: str, opacity: float) -> None:
    """Two lines of tokens in a box."""
    tokens = words.split()
    picture.box(x, y, 128, 36, name, opacity)
    for i, line in enumerate((tokens[:3], tokens[3:])):
        picture.text(x + 64, y + 15 + 15 * i, " | ".join(line), "ink", "middle")


def _run(picture: Picture, x: float, head: str, i: int, state: list[float], out: list[float], word: str) -> None:
    before, after = ("source", "target", "source")[i], ("source", "target", "target")[i]
    middle = x + 74
    picture.text(middle, 20, head, "ink strong", "middle")
    if i == 1:
        _tokens(picture, x + 10, 30, CONTEXT, "target", 0.18)
    _tokens(picture, x + 10, 70, QUESTION, "pale", 1)
    picture.arrow([(middle, 106), (middle, 120)])
    picture.box(x + 20, 120, 108, 24)
    picture.text(middle, 136, "attention", "ink", "middle")
    picture.arrow([(middle, 144), (middle, 162)])
    picture.strip(middle - 66, 163, state, before)
    picture.text(x + 140, 156, ("z", "z'", "z")[i], f"{before} strong", "middle")
    picture.path([(x + 136, 176), (x + 142, 183), (x + 142, 304), (middle + 10, 304)], "line", "dash")
    picture.text(x + 138, 250, "skip", "soft small", "end")
    picture.arrow([(middle - 14, 175), (middle - 14, 192)])
    for y, words in ((192, "W + ΔW" if i == 2 else "W"), (228, "tanh"), (258, "W₂ + ΔW₂" if i == 2 else "W₂")):
        moved = i == 2 and y != 228
        picture.box(x + 10, y, 98, 24, "patch" if moved else "pale", 0.22 if moved else 1)
        picture.text(middle - 15, y + 16, words, "patch strong" if moved else "ink", "middle")
    picture.path([(middle - 14, 216), (middle - 14, 228)])
    picture.path([(middle - 14, 252), (middle - 14, 258)])
    picture.arrow([(middle - 14, 282), (middle, 296)])
    picture.text(middle, 309, "+", "ink strong", "middle")
    picture.arrow([(middle, 313), (middle, 325)])
    picture.strip(middle - 66, 327, out, after)
    picture.text(middle, 354, "⋮  more layers, patched  ⋮" if i == 2 else "⋮  more layers  ⋮", "soft small", "middle")
    picture.text(middle, 376, f"answer: {word}", f"{after} strong", "middle")


def lesson_2() -> Picture:
    """Three components at three inputs, 25 outputs asked of each: which are reached, and which are refused."""
    import numpy as np

    from controllability.components import Bias, Linear, Scale
    from controllability.errors import SideConditionFailed
    from controllability.interfaces import Param

    rows = ("matrix W", Linear(Param("p"))), ("scale m", Scale(Param("p"))), ("bias b", Bias(Param("p")))
    numbers = np.eye(2), np.ones(2), np.zeros(2)
    picture = Picture("Which outputs a matrix, a scale and a bias can be steered to, at three inputs", 462)
    for i, z in enumerate(((2.0, 1.0), (2.0, 0.0), (0.0, 0.0))):
        picture.text(160 + 128 * i, 22, f"input ({z[0]:g}, {z[1]:g})", "ink strong", "middle")
        for j, ((words, component), weight) in enumerate(zip(rows, numbers, strict=True)):
            if i == 0:
                picture.text(12, 100 + 136 * j, words, "ink strong")
            x, y = 160 + 128 * i, 96 + 136 * j
            picture.box(x - 58, y - 62, 116, 124)
            for delta in np.stack(np.meshgrid(range(-2, 3), range(-2, 3)), -1).reshape(-1, 2):
                at = x + 22 * delta[0], y - 22 * delta[1]
                try:
                    component.steer_output({"p": weight}, np.array(z), delta.astype(float))
                    picture.dot(*at, "patch", 5)
                except SideConditionFailed:
                    picture.path([(at[0] - 4, at[1] - 4), (at[0] + 4, at[1] + 4)], "source")
                    picture.path([(at[0] - 4, at[1] + 4), (at[0] + 4, at[1] - 4)], "source")
    picture.dot(110, 448, "patch", 5)
    picture.text(122, 452, "reached by a patch")
    picture.path([(266, 444), (274, 452)], "source")
    picture.path([(266, 452), (274, 444)], "source")
    picture.text(282, 452, "side condition fails")
    return picture


def lesson_3() -> Picture:
    """The two steps of Theorem 1, and at every place of the block whose value is there: the source's, the target's, or neither."""
    import numpy as np

    import controllability as ct
    from controllability.components import Activation, Linear, residual
    from controllability.interfaces import Param

    block = residual(Linear(Param("up", ("h", "d"))) >> Activation("tanh") >> Linear(Param("down", ("d", "h"))))
    params, v, v_context = ct.sample(block, d=4, h=6)
    patch = ct.prove(block).construct(params, v, v_context)
    both = patch.merged_into(params)

    def values(numbers: Any, x: Any) -> list[Any]:
        up = numbers["up"] @ x
        branch = numbers["down"] @ np.tanh(up)
        return [x, up, np.tanh(up), branch, x + branch]

    runs = values(params, v), values(params | {"up": both["up"]}, v), values(both, v), values(params, v_context)
    picture = Picture("The two steps of Theorem 1, place by place", 318)
    for i, head in enumerate(("source run", "step 1", "step 2", "target run")):
        picture.text(138 + 95 * i, 24, head, "ink strong", "middle")
    for j, place in enumerate(("input", "after up", "after tanh", "after down", "output: + skip")):
        y = 50 + 44 * j
        picture.text(8, y + 12, place)
        for i, run in enumerate(runs):
            kind = "other"
            for name, other in (("target", runs[3]), ("source", runs[0])):
                kind = name if np.allclose(run[j], other[j], rtol=1e-12) else kind
            picture.strip(138 + 95 * i - 7 * len(run[j]), y, run[j].tolist(), kind, 14)
    for i, words in ((0, "move up"), (1, "move down")):
        picture.arrow([(150 + 95 * i, 270), (222 + 95 * i, 270)], "patch")
        picture.text(186 + 95 * i, 264, words, "patch small strong", "middle")
    for x, kind, words in (
        (8, "source", "as in the source run"),
        (172, "target", "as in the target run"),
        (336, "other", "neither"),
    ):
        picture.box(x, 296, 12, 12, kind, 0.9, 2)
        picture.text(x + 17, 306, words)
    return picture


def lesson_4() -> Picture:
    """The new scale of every channel on four routes, beside the old one, channels in the order of |G|."""
    import math

    import numpy as np

    import controllability as ct
    from controllability.components import Activation, Linear, residual, rms_norm
    from controllability.interfaces import Param

    inner = Linear(Param("up", ("h", "d"))) >> Activation("tanh") >> Linear(Param("down", ("d", "h")))
    block = residual(inner >> rms_norm("post"))
    params, v, v_context = ct.sample(block, d=64, h=96, seed=1)
    params["post.weight"] = 1 + 0.3 * np.random.default_rng(0).normal(size=64)
    order = np.argsort(abs(block(params, v_context) - v))
    picture = Picture("The norm's scale, old and new, channel by channel, on four routes", 430)
    for i, (route, kind) in enumerate(
        (("scale", "source"), ("secular", "other"), ("uniform", "ink"), ("balanced", "target"))
    ):
        patch = ct.prove(block, route=route).construct(params, v, v_context)
        m = params["post.weight"] + patch["post.weight"].value
        top = 20 + 96 * i
        picture.box(112, top, 360, 84)
        picture.text(8, top + 18, route, f"{kind} strong")
        picture.text(8, top + 38, f"mean m'² {np.mean(m**2):.3g}", "ink small")
        for channel, index in enumerate(order):
            for value, name, radius in ((params["post.weight"][index], "line", 2), (m[index], kind, 2.6)):
                height = (math.log10(max(abs(value), 0.0101)) + 2) / 4.5 * 84
                picture.dot(118 + 5.5 * channel, top + 84 - height, name, radius)
        for decade, words in ((-1, "0.1"), (1, "10")):
            picture.text(108, top + 88 - (decade + 2) / 4.5 * 84, words, "soft small", "end")
    picture.text(292, 418, "64 channels, from small |G| to large |G|; grey: the old scale", "soft small", "middle")
    return picture


def lesson_5() -> Picture:
    """All eight choices of patched layers of the embedded model: the largest error of the logits, and the answer."""
    import torch

    import controllability as ct

    model, tokenizer = ct.load_model("embedded")
    target, source = ct.encode(tokenizer, CONTEXT, QUESTION)
    patch = ct.patch_model(model, target, source)
    picture = Picture("Every choice of patched layers, the error of the scores, and the answer", 330)
    for x, words in ((14, "layers patched"), (150, "largest error of the scores"), (400, "answer")):
        picture.text(x, 22, words, "ink strong")
    for j, layers in enumerate(([], [0], [1], [2], [1, 2], [0, 2], [0, 1], [0, 1, 2])):
        y = 36 + 36 * j
        for layer in range(3):
            picture.box(14 + 34 * layer, y, 28, 22, "patch" if layer in layers else "pale")
            picture.text(28 + 34 * layer, y + 16, str(layer), "paper strong" if layer in layers else "soft", "middle")
        with torch.no_grad(), patch.select(layers=layers or [0]).applied(model) if layers else torch.no_grad():
            logits = model(**source).logits
        error = float((logits - patch.target_logits).abs().max() / patch.target_logits.abs().max())
        picture.box(150, y + 2, 150 * error, 18, "source", 0.85, 2)
        picture.text(158 + 150 * error, y + 16, f"{error:.2f}" if error > 1e-5 else "0, up to rounding")
        word = tokenizer.decode(logits[0, -1].argmax())
        picture.text(400, y + 16, word, "target strong" if word == "Oslo" else "source strong")
    return picture


def lesson_6() -> Picture:
    """Six experts of a mixture, three of them chosen: shares, and how much each one's last map moves, split in two ways."""
    import numpy as np

    import controllability as ct
    from controllability.components import Activation, ExpertLinear, Linear, Mixture, Routing, residual
    from controllability.interfaces import Param

    router, first = Linear(Param("R", ("E", "d"))), ExpertLinear(Param("U", ("E", "h", "d")))
    block = residual(
        Mixture(router, Routing(3), first >> Activation("tanh"), ExpertLinear(Param("V", ("E", "d", "h"))))
    )
    params, v, v_context = ct.sample(block, d=4, h=5, E=6)
    params["R"] = 0.3 * params["R"]
    index, shares = Routing(3)(params, params["R"] @ v)
    y = np.tanh(params["U"][index] @ v)
    found = ct.prove(block, via="output").construct(params, v, v_context)["V"].dense()
    delta = block(params, v_context) - block(params, v)
    rows = [dict.fromkeys(range(6), 0.0) for _ in range(3)]
    for j, e in enumerate(index.tolist()):
        rows[0][e] = float(shares[j])
        rows[1][e] = float(np.linalg.norm(delta) / np.linalg.norm(y[j]) / shares.sum())
        rows[2][e] = float(np.linalg.norm(found[e]))
    picture = Picture("Six experts: their shares, and the sizes of two changes that give the same output", 306)
    for k, (words, kind) in enumerate(
        (("share s", "ink"), ("change: δ/S each", "source"), ("change: least norm", "patch"))
    ):
        top, largest = (
            26 + 88 * k,
            max(rows[k].values()) if k == 0 else max(max(rows[1].values()), max(rows[2].values())),
        )
        picture.text(8, top + 30, words, f"{kind} strong")
        total = sum(rows[k].values()) if k == 0 else sum(value**2 for value in rows[k].values())
        picture.text(8, top + 50, f"{'sum' if k == 0 else 'squares add up to'} {total:.3g}", "ink small")
        for e, value in rows[k].items():
            height, x = 54 * value / largest, 172 + 50 * e
            picture.box(x, top + 62 - max(height, 1), 30, max(height, 1), kind if value else "line", 0.9, 2)
            if value:
                picture.text(x + 15, top + 58 - height, f"{value:.2f}", "ink small", "middle")
    picture.text(8, 296, "expert")
    for e in range(6):
        picture.text(187 + 50 * e, 296, str(e), "ink strong" if e in index else "soft", "middle")
    return picture


def lesson_7() -> Picture:
    """Two tokens, one scale: the point q is a mixture of the columns of A, or a line with normal λ keeps it apart."""
    import numpy as np

    from controllability.errors import ControllabilityError
    from controllability.solvers.joint_scale import joint_scale

    picture = Picture("One scale for two tokens: a point in a cone, or outside it", 300)
    for i, G in enumerate((((2.0, 1.0, 1.0), (1.0, 1.5, 2.0)), ((1.0, 1.0, 1.5), (1.5, 2.0, 2.0)))):
        A, q = np.array(G) ** 2 / 3, np.full(2, 1 / 1.01)
        x0, y0 = 52 + 236 * i, 232

        def at(point: Any, x0: float = x0, y0: float = y0) -> tuple[float, float]:
            return x0 + 112 * float(point[0]), y0 - 112 * float(point[1])

        picture.text(x0 + 72, 22, ("q in the cone: solvable", "q outside: not solvable")[i], "ink strong", "middle")
        outer = A[:, np.argsort(np.arctan2(A[1], A[0]))[[0, -1]]].T
        corners = [at(end * min(1.58 / end)) for end in outer]
        far = [at((1.58, 1.58))] if i == 0 else []
        picture.area([(x0, y0), corners[0], *far, corners[1]], "patch")
        for column in A.T:
            picture.arrow([(x0, y0), at(column)], "patch")
        try:
            joint_scale(np.array(G), np.ones(3), np.ones(2), 1e-2, keep_rms=True)
        except ControllabilityError as refused:
            weights = np.array([float(weight) for weight in refused.certificate.weights])  # pyright: ignore
            normal = weights / np.linalg.norm(weights)
            along = np.array([normal[1], -normal[0]])
            along = along * np.sign(along.sum())
            picture.path([at(-0.25 * along), at(1.75 * along)], "other", "dash")
            picture.arrow([at(0.9 * along), at(0.9 * along + 0.35 * normal)], "other", "thick")
            picture.text(*at(0.9 * along + 0.47 * normal), "λ", "other strong", "middle")
        picture.dot(*at(q), "source", 5)
        picture.text(at(q)[0] + 9, at(q)[1] + 4, "q", "source strong")
    picture.text(12, 268, "green: the columns of A, and all their mixtures A s with s > 0", "soft")
    picture.text(12, 288, "across: the equation of token 1; upwards: that of token 2", "soft")
    return picture


def facts() -> tuple[str, list[str], list[str]]:
    """Four facts, four questions, and the same questions in other words."""
    names, cities = ["Mia", "Leo", "Ana", "Tom"], ["Oslo", "Rome", "Paris", "Lima"]
    context = " ".join(f"{name} lives in {city} ." for name, city in zip(names, cities, strict=True))
    return (
        context,
        [f"Where does {name} live ?" for name in names],
        [f"In which city does {name} stay ?" for name in names],
    )


def lesson_8() -> Picture:
    """How far the embedded model's next words are from the wanted ones: on the set, in other words, on unrelated text."""
    import controllability as ct

    model, tokenizer = ct.load_model("embedded")
    compiled = {name: ct.compile_context(model, tokenizer, *facts(), strength=name) for name in ("exact", "balanced")}
    picture = Picture("Distance from the wanted model on three sets: no patch, exact patch, balanced fit", 376)
    labels = ("the questions", "other wordings", "unrelated text"), ("of the set", "of the questions", "")
    for i, name in enumerate(("queries", "heldout", "unrelated")):
        top = 14 + 112 * i
        picture.text(8, top + 34, labels[0][i], "ink strong")
        picture.text(8, top + 52, labels[1][i], "ink small")
        rows = [("no patch", "line", compiled["exact"].sets[name].unpatched.kl)]
        rows += [
            (key, kind, compiled[key].results[name].kl) for key, kind in (("exact", "source"), ("balanced", "target"))
        ]
        for j, (words, kind, kl) in enumerate(rows):
            y = top + 30 * j
            picture.text(196, y + 16, words, "ink", "end")
            picture.box(204, y + 3, max(80 * kl, 1), 18, kind, 1, 2)
            picture.text(210 + 80 * kl, y + 16, f"{kl:.2f}" if kl > 0.005 else "0")
    picture.text(8, 366, "mean KL divergence of the next word, in nats; 0 is no difference", "soft")
    return picture


PICTURES = {name: make for name, make in globals().items() if name.startswith("lesson_")}


def write(folder: Path = DOCS) -> list[Path]:
    """Every picture to ``folder``; returns the paths."""
    paths = []
    for name, make in PICTURES.items():
        paths.append(folder / f"{name.replace('_', '-')}.svg")
        paths[-1].write_text(make().svg())
    return paths


if __name__ == "__main__":
    print(*write(), sep="\n")
