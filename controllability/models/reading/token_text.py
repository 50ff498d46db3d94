"""Tokens as text, not as the pieces that a tokenizer's file is made of."""

from collections.abc import Sequence
from typing import Any


def word_after(tokenizer: Any, history: Sequence[int], token: int, window: int = 8) -> str:
    """The text that ``token`` adds to what was there, with its space; "�" where it is a part of a sign only."""
    before = _text(tokenizer, history[-window:]).rstrip("\ufffd")
    after = _text(tokenizer, [*history[-window:], token])
    if after != before and after.startswith(before):
        return after.removeprefix(before)
    return _text(tokenizer, [token]) or f"token {token}"  # one beyond the tokenizer's vocabulary has no text


def word(tokenizer: Any, token: int) -> str:
    """A token's own text, without the space before it."""
    text = _text(tokenizer, [token])
    return text.strip() or text or f"token {token}"


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
