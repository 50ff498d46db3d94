"""What each command takes.  Nothing heavy is imported here, so that ``--help`` is instant."""

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any, NamedTuple

VIA, PLACES = ("input-output", "output"), ("feed-forward", "mixer")
ROUTES = ("auto", "balanced", "scale", "secular", "uniform", "ball")
LEVELS, FORMATS = ("derived", "symbolic", "exact", "numeric", "machine"), ("text", "latex", "html", "json", "rocq")
DTYPES = ("float64", "float32", "bfloat16", "float16")
STRENGTHS = ("gentle", "balanced", "strong", "exact")
TEXTS = ("context", "query", "prompt")  # what texts are called that an option takes, or a file


class TextFile(str):
    """The name of a file that holds such a text."""


Arguments = Callable[[ArgumentParser], None]


class Command(NamedTuple):
    """One command: what it does in a sentence, an example, and what adds its arguments to a parser."""

    what: str
    example: str
    arguments: Arguments


def _command(what: str, example: str) -> Callable[[Arguments], Command]:
    """Makes a command of the function that adds its arguments to a parser; the command has its name, without the underscore."""
    return lambda arguments: Command(what, example, arguments)


@_command(
    "The embedded trained model: facts in the context, questions without it.", "controllability demo --out pictures"
)
def _demo(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _out(parser, "DIR", "also write a picture of every layer's error and patch sizes here")
    _device(parser)
    add("--worlds", type=int, default=8, metavar="N", help="how many fresh contexts to draw (default 8)")
    add("--seed", type=int, default=0, help="which contexts are drawn (default 0)")
    add("--scope", choices=("each", "last"), default="each", help="see the patch command")
    _route(parser)


@_command("Registered architectures: a table, or a line each where it is piped.", "controllability list gemma")
def _list(parser: ArgumentParser) -> None:
    what = "only the families whose name, or one of whose model types, has this in it"
    parser.add_argument("filter", nargs="?", default="", metavar="TEXT", help=what)
    parser.add_argument("--markdown", action="store_true", help="the table of docs/architectures.md, not with --json")
    _out(parser)


@_command("Proof that a family's block is patchable, or the refusal.", "controllability prove gemma3 --level symbolic")
def _prove(parser: ArgumentParser) -> None:
    name = "an architecture or model type (see controllability list), a model directory, config.json or GGUF file"
    parser.add_argument("name", metavar="NAME", help=name)
    _out(parser)
    parser.add_argument("--via", choices=VIA, default="input-output", help="Theorem 1 (default) or 1b")
    _place(parser)
    _route(parser)
    parser.add_argument("--jointly", action="store_true", help="one patch for many tokens at once, not one for each")
    level = "what to run (default derived: the rules alone)"
    parser.add_argument("--level", choices=LEVELS, default="derived", help=level)
    form = "default text; --json is --format json; rocq is a file for Coq"
    parser.add_argument("--format", choices=FORMATS, help=form)


@_command(
    "Rebuild a written proof and check every node of it again, without search.",
    "controllability prove gemma3 --json > p.json\n  controllability recheck p.json --level numeric\n"
    "  controllability prove gemma3 --format rocq > p.v\n  controllability recheck p.v",
)
def _recheck(parser: ArgumentParser) -> None:
    what = "written by controllability prove NAME --json (or - for standard input), or --format rocq, its name ending in .v"
    parser.add_argument("file", metavar="FILE", help=what)
    _out(parser)
    level = f"what to run beside: {', '.join(LEVELS)} (default derived)"
    parser.add_argument("--level", choices=LEVELS, default="derived", metavar="LEVEL", help=level)


@_command(
    "Patches that replace a context, on a model directory, GGUF file or Hub id.",
    'controllability patch MODEL_DIR --context "Mia lives in Oslo ." \\\n    --query "Where does Mia live ?"',
)
def _patch(parser: ArgumentParser) -> None:
    _model(parser)
    _text(parser, "context")
    _text(parser, "query")
    _scope(parser, ("each", "last", "all"))
    _solving(parser)
    _measuring(parser)
    _positions(parser)
    _out(parser, "DIR", "save the patch here")


@_command("Reload a saved patch and check it against a fresh target run.", "controllability verify MODEL_DIR PATCH_DIR")
def _verify(parser: ArgumentParser) -> None:
    _model(parser, "the model it was made for")
    parser.add_argument("patch", metavar="PATCH_DIR")
    _measuring(parser)
    _out(parser)


@_command(
    "Generate with the context, and token for token without it from patched weights.",
    'controllability generate embedded --tokens 8 \\\n    --prompt "Mia lives in Oslo . Where does Mia live ?"',
)
def _generate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser)
    _text(parser, "prompt", "; may be given several times: one batch", action="append")
    _out(parser)
    add("--tokens", type=int, default=20, metavar="N", help="how many to generate (default 20)")
    _solving(parser)
    _measuring(parser)
    follow = "whose tokens the history is made of: the contextual model's (default), or the patched model's own"
    add("--follow", choices=("target", "patched"), default="target", help=follow)
    add("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    add("--temperature", type=float, metavar="T", help="with --sample (default: the model's own)")
    add("--top-k", type=int, metavar="K", help="with --sample: draw among the K likeliest")
    add("--top-p", type=float, metavar="P", help="with --sample: among the likeliest that make up P")
    add("--seed", type=int, metavar="S", help="with --sample: which tokens are drawn (default 0)")


@_command(
    "The papers' section 4: prompts × tokens, in every dtype and on every route.",
    "controllability protocol embedded --dtypes float32 bfloat16 --tokens 5",
)
def _protocol(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser)
    add("--tokens", type=int, default=20, metavar="N", help="how many of each prompt (default 20)")
    add("--prompts", metavar="FILE", help="one a line, - is standard input (default: five of ours)")
    _place(parser)
    add("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    dtypes = f"some of {', '.join(DTYPES)} (default: all but float64)"
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[1:], metavar="D", help=dtypes)
    add("--routes", nargs="+", choices=ROUTES, default=ROUTES, metavar="R", help=f"some of {', '.join(ROUTES)}")
    add("--rescale", action="store_true", help="float16 on a copy whose states are divided so that they fit")
    add("--out", dest="picture", metavar="FILE", help="also draw a figure: FILE.svg or FILE.png; must be new")


@_command(
    "One set of weights that answers many queries without their context.",
    "printf 'Where does Mia live ?\\nWhere does Leo live ?\\n' > queries.txt\n"
    "  controllability compile embedded --queries queries.txt --out compiled \\\n"
    '    --context "Mia lives in Oslo . Leo lives in Rome ."',
)
def _compile(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser)
    _text(parser, "context")
    queries = 'one query a line (- is standard input), or .jsonl: {"query": TEXT, "wordings": […], "answer": TEXT, "weight": N, "hard": true}'
    add("--queries", required=True, metavar="FILE", help=queries)
    add("--heldout", metavar="FILE", help="queries that the weights are judged on and not made for")
    near = "texts like the queries of another subject (default: the queries with other names)"
    add("--near", metavar="FILE", help=near)
    add("--unrelated", metavar="FILE", help="texts on which nothing should change (default: some of ours)")
    further = "let the model write N more questions itself (default: none)"
    add("--further-questions", type=int, metavar="N", help=further)
    strength = "how much counts beside the queries; exact: nothing else does (default balanced)"
    add("--strength", choices=STRENGTHS, default="balanced", help=strength)
    made = "the moments command's file, or one to be made the same way (default: made each time)"
    add("--moments", metavar="FILE", help=made)
    add("--answer-tokens", type=int, default=0, metavar="N", help="add N tokens of the contextual model's own answers")
    add("--rank", type=int, metavar="R", help="largest rank of a ΔW (default: as many as it takes)")
    ridge = "λ of a least-squares fit; 0: exact or refused (default with exact: exact, or else strong)"
    add("--ridge", type=float, metavar="L", help=ridge)
    add("--keep-rms", action="store_true", help="exact, without moving the RMS before a norm, or refused")
    _place(parser)
    add("--via", choices=VIA, help="default: output, or input-output where that is not exact, and for least squares")
    add("--dtype", choices=DTYPES, default="float32", help="default float32; float64 computes exactly")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--peft", action="store_true", help="write a PEFT adapter (default: a patch)")
    kind.add_argument("--merge", action="store_true", help="write whole weights that plain transformers loads")
    controls = "also compile and measure controls: sentences shuffled, another context, a random change"
    add("--controls", action="store_true", help=controls)
    add("--picture", action="store_true", help="also draw agreement and drift against rank")
    _out(parser, "DIR", "write it here", required=True)


@_command(
    "Second moments of a model on ordinary text, once for all that is compiled.",
    "controllability moments MODEL_DIR --out moments.safetensors",
)
def _moments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser)
    own = "half what the model writes, half pages on Python"
    texts = f"texts like those it will meet, one a line; - is standard input (default: {own})"
    add("--texts", metavar="FILE", help=texts)
    _place(parser)
    without = "a context to be compiled: texts with 8 words in a row of it are refused"
    add("--context-file", dest="context", type=TextFile, metavar="FILE", help=without)
    add("--dtype", choices=DTYPES, default="float32", help="that of the compile command (default float32)")
    out = "write them here, now and then; where an interrupted run has written, go on"
    add("--out", required=True, metavar="FILE", help=out)


@_command(
    "Which part of a context changed the weights, chunk by chunk.",
    'controllability attribute embedded --query "Where does Leo live ?" \\\n    --context "Mia lives in Oslo . Leo lives in Rome ." --out found',
)
def _attribute(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _studying(parser, "sentence", ("forward", "backward", "all"))
    orders = "with --order all: how many orders (default: all of 4 chunks, or 8)"
    add("--permutations", type=int, metavar="N", help=orders)
    ablations = "random ablations beside leave-one-out, each a run of its own (default 32; 0: neither)"
    add("--ablations", type=int, default=32, metavar="N", help=ablations)
    add("--seed", type=int, default=0, help="which orders and ablations are drawn (default 0)")


@_command(
    "How the patch grows with its context, beside a step of gradient descent.",
    'controllability dynamics embedded --query "Where does Leo live ?" \\\n    --context "Mia lives in Oslo . Leo lives in Rome ."',
)
def _dynamics(parser: ArgumentParser) -> None:
    _studying(parser, "token", ("forward", "backward"))
    parser.add_argument("--skip-gradients", action="store_true", help="leave the gradient steps out")


@_command("A saved patch as a table and a heat map.", "controllability inspect PATCH_DIR --out pictures")
def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("patch", metavar="PATCH_DIR", help="written by controllability patch --out, or mp.save()")
    _out(parser, "DIR", "write a picture and a page here")


@_command(
    "Patches of thousands of pairs as a Parquet table; an interrupted run goes on.",
    "controllability survey embedded --data pairs.jsonl --out found\n"
    "  torchrun --nproc-per-node 2 -m \\\n    controllability survey MODEL --data pairs.jsonl --out found",
)
def _survey(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _model(parser)
    data = 'UTF-8, a pair a line: {"context": TEXT, "query": TEXT}, with an "id" if you like'
    add("--data", required=True, metavar="FILE", help=data)
    add("--batch", type=int, default=16, metavar="N", help="pairs of one run (default 16)")
    _scope(parser, ("each", "last"))
    _solving(parser, "secular")
    _positions(parser)
    where = "write the table here: new, empty, or of the same survey, which goes on"
    add("--out", required=True, metavar="DIR", help=where)


@_command(
    "Write a saved patch as an adapter that peft loads, and check it there.",
    "controllability export PATCH_DIR --peft ADAPTER_DIR\n"
    "  controllability export PATCH_DIR --servable vllm --out ADAPTER_DIR",
)
def _export(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("patch", metavar="PATCH_DIR", help="written by controllability patch --scope last (or all) --out")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--peft", metavar="DIR", help="write a PEFT adapter here")
    _out(where, "DIR", "the same")
    model = "the model it was made for (default: the directory or file that the patch remembers)"
    add("--model", metavar="MODEL", help=model)
    served = "for this server: no norm moves, its rules are read against it, and what queries lose is measured"
    add("--servable", choices=("vllm", "sglang", "peft"), help=served)
    most = "with --servable: the server's largest rank (default: what the patch needs)"
    add("--max-rank", type=int, metavar="R", help=most)
    add("--moments", metavar="FILE", help="with --servable: the metric in which it is fitted anew or cut")
    _loading(parser)


def _studying(parser: ArgumentParser, chunks: str, orders: tuple[str, ...]) -> None:
    add = parser.add_argument
    _model(parser)
    _text(parser, "context")
    _text(parser, "query")
    add("--chunks", choices=("sentence", "line", "token"), default=chunks, help=f"what a step is (default {chunks})")
    order = "default forward; backward: the context leaves the source from the front; all: the mean over orders"
    add("--order", choices=orders, default="forward", help=order)
    add("--answer", metavar="TEXT", help="whose probability is followed (default: the likeliest token)")
    _solving(parser, "secular")
    _out(parser, "DIR", "write a picture and a page here")


def _model(parser: ArgumentParser, what: str = "written by save_pretrained, a GGUF file, or a Hub id") -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{what}; embedded is the package's own trained model")
    _loading(parser)


def _loading(parser: ArgumentParser) -> None:
    code = "run code that a model directory brings (off by default)"
    parser.add_argument("--trust-remote-code", action="store_true", help=code)
    _device(parser)


def _device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="D", help="where the model runs: cpu (default), cuda, mps …")


def _text(parser: ArgumentParser, name: str, more: str = "", **how: Any) -> None:
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument(f"--{name}", metavar="TEXT", help=f"the {name}, or - for standard input{more}", **how)
    file = "holds it in UTF-8 (the end of the last line is no part of it), or - for standard input"
    one.add_argument(f"--{name}-file", dest=name, type=TextFile, metavar="FILE", help=file, **how)


def _out(parser: Any, kind: str = "FILE", what: str = "write what would be printed to this file", **how: Any) -> None:
    dest, state = ("out", "new or empty") if kind == "DIR" else ("into", "new")
    parser.add_argument("--out", dest=dest, metavar=kind, help=f"{what}; must be {state}", **how)


def _measuring(parser: ArgumentParser) -> None:
    what = "do not measure how much a small disturbance grows"
    parser.add_argument("--skip-sensitivity", action="store_true", help=what)


def _scope(parser: ArgumentParser, scopes: tuple[str, ...]) -> None:
    what = "a patch for each position (default), one for the last" + ", or one for all of them" * ("all" in scopes)
    parser.add_argument("--scope", choices=scopes, default="each", help=what)


def _positions(parser: ArgumentParser) -> None:
    positions = "positions of the query: as in the target (default), or from 0"
    parser.add_argument("--positions", choices=("keep", "reset"), default="keep", help=positions)


def _solving(parser: ArgumentParser, route: str = "auto") -> None:
    parser.add_argument("--via", choices=VIA, default="input-output")
    _place(parser)
    _route(parser, route)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32; float64 computes exactly")


def _place(parser: ArgumentParser) -> None:
    what = "the half of a layer that is patched; mixer: the map behind attention or a scan (default: the first that there is)"
    parser.add_argument("--place", choices=PLACES, help=what)


def _route(parser: ArgumentParser, default: str = "auto") -> None:
    what = f"what a normalised output does: {', '.join(ROUTES)} (default {default})"
    parser.add_argument("--route", choices=ROUTES, default=default, metavar="R", help=what)


@_command("Where the pages are that explain all this, or how they are built.", "controllability docs")
def _docs(parser: ArgumentParser) -> None:
    _out(parser)


# in the order in which help lists them
COMMANDS = {name[1:]: found for name, found in [*globals().items()] if isinstance(found, Command)}
