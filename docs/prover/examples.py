"""The blocks that the page begins with, and the parts that it offers."""

UP_DOWN = 'up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))\n'
GATED = 'gate, up = Linear(Param("gate", ("h", "d"))), Linear(Param("up", ("h", "d")))\ndown = Linear(Param("down", ("d", "h")))\n'

EXAMPLES = (  # title, expression, options of prove
    ("Feed-forward block", UP_DOWN + 'residual(up >> Activation("gelu") >> down)', {}),
    ("Gated, with norms (Gemma)", GATED + 'half = gated(gate, up, Activation("silu")) >> down\nresidual(rms_norm("pre") >> half >> rms_norm("post"))', {}),
    ("One linear map, Theorem 1b", 'residual(Linear(Param("W", ("d", "d"))))', {"via": "output"}),
    ("A soft-cap can be undone", UP_DOWN + 'residual(up >> Activation("silu") >> down >> SoftCap(30.0))', {}),
    (
        "Mixture of experts",
        'first, last = ExpertLinear(Param("first", ("E", "h", "d"))), ExpertLinear(Param("last", ("E", "d", "h")))\n'
        'router = Linear(Param("router", ("E", "d")))\nresidual(rms_norm("pre") >> Mixture(router, Routing(2), first >> Activation("silu"), last))',
        {},
    ),
    ("A registered family", 'block("llama")', {}),
    ("Many tokens, one patch", UP_DOWN + 'residual(up >> Activation("gelu") >> down)', {"jointly": True}),
    ("Refused: tanh at the end", UP_DOWN + 'residual(up >> down >> Activation("tanh"))', {}),
    ("Refused: one matrix, used twice", 'W = Linear(Param("W", ("d", "d")))\nresidual(W >> Activation("silu") >> W)', {}),
    ("Refused: down is frozen", UP_DOWN + 'residual(rms_norm("pre") >> up >> Activation("silu") >> down)', {"frozen": "down"}),
    ("Error: sizes do not fit", 'residual(Linear(Param("up", (4, 3))) >> Linear(Param("down", (3, 6))))', {}),
)  # fmt: skip

PALETTE = (  # what is offered, and the expression that is put in
    ("linear map", 'Linear(Param("W", ("d", "d")))'),
    ("linear map with bias", 'Linear(Param("W", ("d", "d")), Param("b", ("d",)))'),
    ("activation", 'Activation("silu")'),
    ("gated half", GATED + 'gated(gate, up, Activation("silu")) >> down'),
    ("RMSNorm", 'rms_norm("norm")'),
    ("LayerNorm", 'layer_norm("norm")'),
    ("scale", 'Scale(Param("m", ("d",)))'),
    ("bias", 'Bias(Param("b", ("d",)))'),
    ("constant factor", "Times(0.5)"),
    ("soft-cap", "SoftCap(30.0)"),
    ("normalise only", 'Normalize("rms", 1e-06)'),
    ("residual", UP_DOWN + 'residual(up >> Activation("silu") >> down)'),
    ("sum", 'Linear(Param("A", ("d", "d"))) + Linear(Param("B", ("d", "d")))'),
    ("product", 'Linear(Param("A", ("d", "d"))) * Linear(Param("B", ("d", "d")))'),
    (
        "mixture of experts",
        'Mixture(Linear(Param("router", ("E", "d"))), Routing(2), '
        'ExpertLinear(Param("first", ("E", "h", "d"))) >> Activation("silu"), ExpertLinear(Param("last", ("E", "d", "h"))))',
    ),
    ("identity", "Identity()"),
)
