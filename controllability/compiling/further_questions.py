"""Questions that the contextual model writes itself: further queries, where a user has few."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from controllability.compiling.token_sets import Context
from controllability.compiling.unrelated_texts import known_to
from controllability.errors import BadInput
from controllability.models.hooks.own_modes import own_modes
from controllability.models.reading.model_facts import position_limit, text_config
from controllability.models.reading.token_text import text_after
from controllability.models.tokens import going_on

PROMPT, LENGTH, TRIES = "\nQuestion:", 24, 4


def further_questions(
    model: Any, tokenizer: Any, context: str, count: int, known: Sequence[str] = (), seed: int = 0
) -> list[str]:  # fmt: skip
    """Up to ``count`` different questions that the model writes behind the context and "Question:", drawn with ``seed``.

    Four times as many are drawn (top-p 0.9) and cut at the question mark; what repeats another, one of ``known`` or the context, or is no question,
    is left out: there may be fewer.  Look at them: nobody else has.  Raises ``BadInput``.  Source: new.

    >>> from controllability.models.loading import load_model
    >>> found = further_questions(*load_model("embedded"), "Mia lives in Oslo . Leo lives in Rome .", 2, ["Where does Mia live ?"])
    >>> len(found), all(question.endswith("?") for question in found), "Where does Mia live ?" in found
    (2, True, False)
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadInput(f"the number of further questions must be a whole number from 1 on, got {count!r}")
    if not hasattr(model, "generate"):
        raise BadInput(f"a {type(model).__name__} does not generate: write further questions yourself")
    before = Context.of(tokenizer, context, position_limit(text_config(model)))
    ids = [*before.tokens, *(going_on(tokenizer, PROMPT, []) if known_to(tokenizer, [PROMPT]) else [])]
    before.refuse_too_long(PROMPT, len(ids), LENGTH)
    start = torch.tensor([ids], device=next(model.parameters()).device)
    with own_modes(model), torch.random.fork_rng([start.device] if start.is_cuda else []), torch.no_grad():
        torch.manual_seed(seed)
        drawn = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_p=0.9, top_k=0, temperature=1.0, max_new_tokens=LENGTH,
            num_return_sequences=TRIES * count, pad_token_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip
    found: dict[str, str] = {}
    seen = {" ".join(text.split()).casefold() for text in known}
    for row in drawn.tolist():
        said, mark, _ = text_after(tokenizer, ids, row[len(ids) :]).partition("?")
        text = re.split(r"(?<=[.!])\s+|\n", f"{said}{mark}".strip())[-1].removeprefix(PROMPT.strip()).strip()
        key = " ".join(text.split()).casefold()
        if mark and len(text.split()) > 2 and key not in seen and key not in context.casefold():
            found.setdefault(key, text)
    return [*found.values()][:count]
