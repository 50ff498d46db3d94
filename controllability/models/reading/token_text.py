"""Tokens as text, not as the pieces that a tokenizer's file is made of."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import ByteLevel


def word_after(tokenizer: Any, history: Sequence[int], token: int) -> str:
    """The text that ``token`` adds to what was there, with its space; "�" where it is a part of a sign only."""
    return text_after(tokenizer, history, [token]) or f"token {token}"  # one beyond the vocabulary has no text


def text_after(tokenizer: Any, history: Sequence[int], tokens: Sequence[int], window: int = 8) -> str:
    """The text that tokens add to what was there, with the space before it."""
    before = _text(tokenizer, history[-window:]).rstrip("\ufffd")
    after = _text(tokenizer, [*history[-window:], *tokens])
    if after != before and after.startswith(before):
        return after.removeprefix(before)
    return _text(tokenizer, tokens)


def word(tokenizer: Any, token: int) -> str:
    """A token's own text, without the space before it."""
    text = _text(tokenizer, [token])
    return text.strip() or text or f"token {token}"


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.decoder is None:  # decode would give the pieces that its file is made of
        made_by, pieces = f"{backend.normalizer}{backend.pre_tokenizer}", tokenizer.convert_ids_to_tokens(list(ids))
        if "\u2581" in made_by:
            return "".join(filter(None, pieces)).replace("\u2581", " ")
        if "ByteLevel" in made_by:
            return ByteLevel().decode([*filter(None, pieces)])
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
