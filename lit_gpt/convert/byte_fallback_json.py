"""`tokenizer.json` of BPE over characters with byte fallback (Llama 2, Mistral, Phi-3, Gemma) ↔ our tokenizers.

The file itself becomes part of the checkpoint. Of its added tokens those that it calls special, those written <|…|> and
those that begin and end a text are never made from text; the others (Gemma's runs of line ends) are, as transformers
does.
"""

from __future__ import annotations

import re
from typing import Any

from lit_gpt.convert.probe_texts import probe_texts
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.byte_fallback import ByteFallbackTokenizer, hub_tokenizer
from lit_gpt.tokenizer.vocabulary import is_panic

_MARKER = re.compile(r"<\|.*\|>", re.DOTALL)


def is_byte_fallback(values: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is of this kind."""
    model = values.get("model")
    return isinstance(model, dict) and model.get("byte_fallback") is True and model.get("type", "BPE") == "BPE"


def read_byte_fallback(
    values: dict[str, Any], end: str | None, first: str | None, chat_template: str | None, where: str, name: str
) -> ByteFallbackTokenizer:
    """The tokenizer of a file of this kind.

    Args:
        values: the file's content.
        end: the token that ends a text, if there is one.
        first: the token that stands before every text, if there is one.
        chat_template: as for `Tokenizer`.
        where: how errors name the file.
        name: the tokenizer's.

    Raises:
        UserError: naming what is not supported, or damaged.
    """
    added = _with_special(values, [name for name in (end, first) if name is not None])
    ids = {token["content"]: token["id"] for token in added}
    try:
        tokenizer = ByteFallbackTokenizer.of_content(
            name,
            {**values, "added_tokens": added},
            bos_id=None if first is None else ids.get(first),
            chat_template=chat_template,
            end_of_text=end if end in ids else None,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    _check_same(tokenizer, values, where)
    return tokenizer


def _with_special(values: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The added tokens, those of `names` that the vocabulary has among them and special."""
    added = [
        {**token, "special": True} if token["content"] in names or _MARKER.fullmatch(token["content"]) else token
        for token in values.get("added_tokens") or []
    ]
    vocabulary = values["model"].get("vocab")
    missing = set(names) - {token["content"] for token in added}
    if isinstance(vocabulary, dict):
        added += [{"id": vocabulary[name], "content": name, "special": True} for name in missing if name in vocabulary]
    return added


def _check_same(tokenizer: ByteFallbackTokenizer, values: dict[str, Any], where: str) -> None:
    """Compare ids and texts with those of the file as it is, on probe texts and on every token."""
    theirs = hub_tokenizer(values, where)
    texts = [text for text in probe_texts() if not any(name in text for name in tokenizer.specials)]
    try:
        for text in texts:
            wanted = theirs.encode(text, add_special_tokens=False).ids
            if tokenizer.encode(text) != wanted or tokenizer.decode(wanted) != theirs.decode(wanted):
                raise UserError(
                    f"{where} has steps that are not known here: {text[:40]!r} differs; choose another model"
                )
        wrong = next((t for t, i in tokenizer.specials.items() if theirs.token_to_id(t) != i), None)
    except BaseException as error:
        if isinstance(error, UserError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise UserError(
            f"{where} fails on a text ({' '.join(str(error).split())[:200]}): choose another model"
        ) from None
    if wrong is not None:
        raise UserError(f"{where}: its token {wrong[:40]!r} has another id in the vocabulary: get it again")
