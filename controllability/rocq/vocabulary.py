"""What a certificate may consist of: the sentences and names that are written here, and no others. Checked before Coq sees a file."""

import re

from controllability.errors import BadInput
from controllability.rocq.names import LOGIC, stated

LARGEST, LONGEST_NUMBER, DEEPEST = 1 << 20, 40, 200
NAME = r"[A-Za-z_]\w*'?"
TOKEN = re.compile(rf"\s+|{NAME}|\d+|:=|=>|->|<>|/\\|[(){{}}:,=<+*/-]", re.ASCII)
WORDS = (
    frozenset(["fun", "let", "in", "forall", "exists", "Type", "Finite", "Rabs", "sqrt", "tanh", "eq_refl", "_"])
    | LOGIC
)
START = (
    "From Coq Require Import Reals", "From Controllability Require Import Theory", "Open Scope R_scope", "Section certificate",
)  # fmt: skip
END = ("End certificate", "Print Assumptions perfect")
# A variable has a type of data: one that holds a statement would be an assumption, and is none of these.
SENTENCES = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"Context (?P<rest>(?:\{{{NAME} : Type\}} \{{finite_{NAME} : Finite {NAME}\}} ?)+)",
        rf"Variables? (?P<names>{NAME}(?: {NAME})*) : (?P<rest>[\w()*+> -]+)",
        rf"Definition (?P<names>{NAME})(?P<rest>(?: \(| :).*)",
        r"Theorem (?P<names>patch|perfect)(?P<rest> .+)",
        r"Proof",
        r"exact (?P<rest>\(.+\))",
        r"Qed",
    )
)
BINDERS = re.compile(rf"\b(?:fun|let|exists) \(?({NAME})|[({{]({NAME}) :|\bforall ((?:{NAME} )*{NAME}),", re.ASCII)


def check_vocabulary(text: str) -> None:
    """Raise ``BadInput`` for a text that is not built as certificates are: another command, another name, another sign.

    >>> check_vocabulary("Load anything.")
    Traceback (most recent call last):
    controllability.errors.BadInput: this is no certificate: it does not begin with From Coq Require Import Reals. …
    """
    if len(text) > LARGEST:
        raise BadInput(f"a certificate has at most {LARGEST} characters, this has {len(text)}")
    plain = re.sub(r"\(\*[^*()\"]*\*\)", " ", text)
    *sentences, rest = (re.sub(r"\s+", " ", one).strip() for one in re.split(r"\.(?=\s|$)", plain))
    if tuple(sentences[: len(START)]) != START:
        raise BadInput(f"this is no certificate: it does not begin with {START[0]}. …")
    if tuple(sentences[-len(END) :]) != END or rest:
        raise BadInput(f"this is no certificate: it does not end with {'. '.join(END)}.")
    known, proved = set(WORDS | stated()), list[str]()
    for sentence in sentences[len(START) : -len(END)]:
        found = next((match for pattern in SENTENCES if (match := pattern.fullmatch(sentence))), None)
        if found is None:
            raise BadInput(f"a certificate has no such sentence: {sentence:.80}")
        given = found.groupdict()
        new = (given.get("names") or "").split()
        if twice := known & set(new):
            raise BadInput(
                f"{min(twice)} is stated twice, or is a name of the theory: a certificate states a name once"
            )
        bound = _check_terms(given.get("rest") or "", known)
        known |= {*new, *(bound if sentence.startswith(("Context", "Theorem")) else ())}  # hypotheses: for the proof
        proved += new if sentence.startswith("Theorem") else []
    if proved != ["patch", "perfect"]:
        raise BadInput("a certificate states the theorems patch and perfect, each once and in this order")


def _check_terms(text: str, known: set[str]) -> set[str]:
    """The names that a text binds, every sign, number and name of it known."""
    bound = {name for found in BINDERS.findall(text) for names in found for name in names.split()}
    at = depth = 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None:
            raise BadInput(f"a certificate has no such sign: {text[at : at + 20]!r}")
        at, word = token.end(), token[0]
        depth += (word == "(") - (word == ")")
        if depth > DEEPEST or (word.isdigit() and len(word) > LONGEST_NUMBER):
            raise BadInput(
                f"a certificate nests at most {DEEPEST} deep and has numbers of at most {LONGEST_NUMBER} digits"
            )
        if word[0].isidentifier() and word not in known and word not in bound:
            raise BadInput(f"{word} is neither a name of the theory nor of this certificate")
    return bound


def theorem_of(text: str) -> str:
    """What a certificate states, for a reader: the block, and the theorem of its patch with what that names."""
    plain = re.sub(r"\(\*[^*()\"]*\*\)", " ", text)
    sentences = [re.sub(r"\s+", " ", one).strip() for one in re.split(r"\.(?=\s|$)", plain)]
    shown = [one for one in sentences if re.match(r"(Context|Variables?|Definition (?!tree\b)|Theorem patch)", one)]
    return "\n".join(f"{one}." for one in shown)
