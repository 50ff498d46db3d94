"""Families whose feed-forward half cannot take the context, or is not there: the map behind what mixes positions does."""

from collections.abc import Mapping
from typing import Any

from architectures.feed_forward import Plain, layer_norm
from architectures.mixers import Mixer, state
from architectures.registry import StatePoint
from architectures.shapes import without_feed_forward
from architectures.view import View
from controllability.components import Activation, Blend, Fixed, Mixed, Product, Select, Sequence, Sum
from controllability.interfaces import Component

NO_HALF = "its layers have no feed-forward half: all that they do mixes positions"
ELSEWHERE = "place='mixer': the map behind what mixes positions takes the whole effect of the context"
LAYER_OUTPUT = StatePoint("", "after")

SCAN = Mixer("mixer.out_proj", output=LAYER_OUTPUT)
for name, layer in (("mamba", "MambaBlock"), ("mamba2", "Mamba2Block"), ("falcon_mamba", "FalconMambaBlock")):
    without_feed_forward(name, layer, "every layer", NO_HALF, ELSEWHERE, "no feed-forward half", "none", mixer=SCAN)
for name, layer, mamba in (
    ("zamba", "ZambaHybridLayer", "ZambaMambaDecoderLayer"),
    ("zamba2", "Zamba2HybridLayer", "Zamba2MambaDecoderLayer"),
):
    without_feed_forward(
        name, layer, "shared transformer block",
        "its feed-forward output only enters a Mamba mixer, which mixes positions; and its weights are those of every hybrid layer",
        ELSEWHERE, "shared block before a mixer", "gated", mixer=Mixer("mamba.out_proj", output=LAYER_OUTPUT), mixer_class=(mamba,),
    )  # fmt: skip


def receptance(view: View) -> Component:
    """σ(R (μ∘n(x) + (1 − μ)∘n(x before))), the gate of RWKV's channel mix; n(x before) is what the token shift gives."""
    here, before = Sequence((state(view), layer_norm("ln2")(view))), Mixed(2, "token shift", view.size("d"))
    mixed = Blend(here, before, view.param("feed_forward.time_mix_receptance", "one", "one", "d"))
    return Sequence((mixed, view.linear("feed_forward.receptance", "d", "d"), Activation("sigmoid")))


def position_before(module: Any, given: Mapping[str, Any]) -> Any:
    """n(x) of the position before, as the channel mix takes it: from its state too, if there is one."""
    hidden, state = given["hidden"], given.get("state")
    shifted = module.time_shift(hidden).clone()
    if state is not None:
        shifted[:, 0] = state[0][:, :, module.layer_id]
    return shifted


def channel_mix(view: View) -> Component:
    """x + r ∘ V k: k and r read the position before as well."""
    view.sites["inputs"] = (
        StatePoint("ln2"), StatePoint("feed_forward.value"), StatePoint("feed_forward", take=position_before)
    )  # fmt: skip
    view.sites["output"] = LAYER_OUTPUT
    value = Mixed(1, "key", view.size("h")) >> view.linear("feed_forward.value", "d", "h")
    return Sum((state(view), Product((value, Fixed(receptance(view))))))


without_feed_forward(
    "rwkv", "RwkvBlock", "token shift (feed_forward.time_shift)",
    "the feed-forward half reads neighbouring positions: its first maps see a mix with the position before", ELSEWHERE,
    "sequential, token shift", "plain, gated by a receptance",
    mixer=(Mixer("attention.output", entry=StatePoint("ln1"), output=StatePoint("ln2")), channel_mix),
)  # fmt: skip


def other_stream(view: View) -> Component:
    """x₂ + feed-forward half of y₁: what the first stream has become is written into the second."""
    view.sites["inputs"] = (StatePoint("", argument="hidden_states"), StatePoint("feed_forward.layer_norm"))
    view.sites["output"] = StatePoint("", "after", "hidden_states")
    half = Plain("feed_forward.dense.dense", "feed_forward.output.dense", default="relu")
    first = Select(1, "first stream", view.size("d"))
    return Sum((state(view), Sequence((first, layer_norm("feed_forward.layer_norm")(view), half(view)))))


without_feed_forward(
    "reformer", "ReformerLayer", "reversible residual",
    "the layer hands on two streams and its feed-forward half writes into one of them: the other keeps the context", ELSEWHERE,
    "two residual streams", "plain",
    mixer=(
        Mixer(
            "attention.output.dense", entry=StatePoint("", argument="prev_attn_output"),
            output=StatePoint("feed_forward.layer_norm"),
        ),
        other_stream,
    ),
)  # fmt: skip
