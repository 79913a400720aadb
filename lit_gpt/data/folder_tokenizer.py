"""The tokenizer of a folder of shards: the one beside them, or the one that is named for shards that do not say."""

from __future__ import annotations

from pathlib import Path

from lit_gpt.console.messages import note
from lit_gpt.data.formats import check_template
from lit_gpt.data.index import TEXT, ShardIndex
from lit_gpt.data.remote import is_remote
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, is_trained


def folder_tokenizer(
    path: str, index: ShardIndex, file: Path | None, spec: str | None, fallback: Tokenizer | None
) -> Tokenizer | None:
    """What the ids of a folder mean; None where nobody knows.

    Args:
        path: of the folder, or its address.
        index: of its shards.
        file: the tokenizer beside them, if there is one.
        spec: `data.tokenizer`: the one that is named, or asked for.
        fallback: for shards that do not say, where none is named: the model's own.

    Raises:
        UserError: shards and tokenizer do not belong together.
    """
    if index.masked and file is None:
        raise UserError(f"{path}: its {TOKENIZER_FILE} is missing, which has the chat template: put it back")
    if file is not None:
        return _beside(path, index, file, spec)
    if spec is None and not is_remote(path) and (Path(path) / "meta.pkl").exists():
        note(f"{path}: its vocabulary is in meta.pkl, which is not read since a pickle can run code")
        return None
    chosen = fallback if fallback and spec is None else get_tokenizer(spec or "gpt2")
    if index.tokenizer_hash not in (None, chosen.hash):
        raise UserError(
            f"{path}: its {TOKENIZER_FILE} is missing, and its shards are of {index.tokenizer}, not of "
            f"{chosen.name}: put it back, or name theirs with --data.tokenizer"
        )
    return chosen


def _beside(path: str, index: ShardIndex, file: Path, spec: str | None) -> Tokenizer:
    """The tokenizer in `file`. Raises UserError where it is not that of the shards, or not the one asked for."""
    found = Tokenizer.load(file)
    if index.tokenizer_hash not in (None, found.hash):
        raise UserError(f"{path}: its {TOKENIZER_FILE} is not the one that its shards were made with; prepare it again")
    if index.masked:
        check_template(index, found, f"{path}: {TOKENIZER_FILE}")
    if spec in (None, found.name):
        return found
    asked = None if is_trained(str(spec)) else get_tokenizer(str(spec))
    if asked is not None and index.format != TEXT:
        asked = with_chat_template(asked)
    if asked is None or asked.hash != found.hash:
        raise UserError(
            f"{path} holds shards of the tokenizer {found.name}, not {spec}: leave --data.tokenizer out, "
            "or prepare the text in another folder"
        )
    return found


def check_same_kind(name: str, index: ShardIndex, path: str, wanted: ShardIndex) -> None:
    """Refuse a folder of a mixture whose ids mean something else than those of the validation data.

    Args:
        name: the folder's.
        index: its own.
        path: of the folder with the validation data.
        wanted: that one's index, of the same format.

    Raises:
        UserError: another tokenizer, or another chat template.
    """
    remedy = f"prepare {name} again with --tokenizer {path}/tokenizer.json"
    hashes = index.tokenizer_hash, wanted.tokenizer_hash
    if None not in hashes and hashes[0] != hashes[1]:
        theirs, ours = (f"{each.tokenizer} ({str(each.tokenizer_hash)[:12]})" for each in (index, wanted))
        raise UserError(f"data.mixture: {name} holds shards of the tokenizer {theirs}, {path} of {ours}: {remedy}")
    if index.template_sha256 != wanted.template_sha256:
        raise UserError(f"data.mixture: {name} was prepared with another chat template than {path}: {remedy}")
