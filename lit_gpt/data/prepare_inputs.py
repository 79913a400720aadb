"""The inputs of a preparation in each format of data, their tokenizer, and whether a folder was made from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_gpt.data.formats import MASKED_FORMATS, MaskedFormat
from lit_gpt.data.index import TEXT
from lit_gpt.data.prepare_state import DOWNLOADS, PrepareState, sources_hash
from lit_gpt.data.sources import STDLIB, find_sources
from lit_gpt.data.text_source import TextSource
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer, is_trained


def check_format(inputs: Sequence[str], data_format: str, text_field: str) -> None:
    """Refuse inputs and options of another format. Raises UserError."""
    if data_format != TEXT and text_field != "text":
        raise UserError(f"text_field {text_field} is for text: leave it out for {MASKED_FORMATS[data_format].what}")
    for name in inputs:
        right = next((known for known, masked in MASKED_FORMATS.items() if name in masked.generated), None)
        if right not in (None, data_format):
            raise UserError(
                f"{name} is made for format {right}, not {data_format}: give --format {right} (of fit: --data.format)"
            )
        if name == STDLIB and data_format != TEXT:
            names = ", ".join(MASKED_FORMATS[data_format].generated)
            raise UserError(f"{name} is text, not {MASKED_FORMATS[data_format].what}: name files of them, or {names}")


def sources_of(
    inputs: Sequence[str], downloads: Path, text_field: str, masked: MaskedFormat | None
) -> list[TextSource]:
    """The files that `inputs` name, as `find_sources` finds them for a format. Raises UserError."""
    if masked is None:
        return find_sources(inputs, downloads, text_field)
    return find_sources(inputs, downloads, suffixes=masked.suffixes, generated=masked.generated)


def chosen_tokenizer(spec: str, masked: MaskedFormat | None) -> Tokenizer | str:
    """The tokenizer, or the spec of one that is trained on text.

    Raises:
        UserError: there is none, or the format has none trained.
    """
    if not is_trained(spec):
        return get_tokenizer(spec) if masked is None else with_chat_template(get_tokenizer(spec))
    if masked is not None:
        raise UserError(
            f'tokenizer "{spec}" would be made from the text of {masked.what}: name one that exists, such as gpt2, '
            "byte or a saved one's path, or start from a model with lit_gpt fit --init_from MODEL"
        )
    return spec


def check_same_sources(folder: str, source: str, data_format: str) -> None:
    """Refuse a folder that was made from other inputs than `source` is now: its shards would be trained on instead.

    A source that is gone is not asked for, and a folder without the state of its preparation is taken as it is.

    Raises:
        UserError: the inputs differ.
    """
    state = PrepareState.read(Path(folder))
    if state is None or not state.sources:
        return
    check_format([source], data_format, "text")
    try:
        found = sources_of([source], Path(folder) / DOWNLOADS, "text", MASKED_FORMATS.get(data_format))
        now = sources_hash([each.fingerprint for each in found])
    except UserError:
        return
    if now != state.sources:
        raise UserError(
            f"{folder} holds shards of other files than {source}, or of what it was before it was changed: name "
            "another --data.path for it, or give --data.source null to train on those shards"
        )
