"""Texts as token ids: every special token once, and what stands between a context and its query."""

from typing import Any


def with_special(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """(ids of a text that goes on, how many of them the tokenizer puts before any text).

    What the text begins with already (chat templates write ``<bos>``) is not put before it again, and a mark that the text
    ends is left out unless the text has it.
    """
    ids = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    lead = next((k for k in reversed(range(len(ids))) if ids[k : k + len(bare)] == bare), None)
    if not ids:
        return ids, 0
    if lead is None:  # special tokens among its own
        special = set(tokenizer.all_special_ids)
        return ids, next((i for i, token in enumerate(ids) if token not in special), len(ids))
    if ids[lead + len(bare) :] == [tokenizer.eos_token_id]:
        ids.pop()
    return (ids[lead:] if bare[:lead] == ids[:lead] else ids), lead


def going_on(tokenizer: Any, text: str, lead: list[int]) -> list[int]:
    """Ids of a text that stands behind another, which begins with ``lead``: without special tokens, and without that."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[len(lead) :] if ids[: len(lead)] == lead else ids


def how_joined(tokenizer: Any, context: str, query: str, ids: list[int]) -> dict[str, Any]:
    """What stands ``between`` the two texts, and whether ``ids`` are those of both as one text."""
    between = context[len(context.rstrip()) :] + query[: len(query) - len(query.lstrip())]
    return {"between": between, "as_one_text": ids == with_special(tokenizer, context + query)[0]}


def joined_text(joined: dict[str, Any]) -> str:
    """The same in a line."""
    said = f"with {joined['between']!r} between them" if joined["between"] else "without a space between them"
    other = "" if joined["as_one_text"] else "; tokenised as one text they would be other tokens"
    return f"context and query are joined {said}{other}"
