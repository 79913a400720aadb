"""The formats of training data beside plain text: how their documents are read, and how they become marked tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lit_gpt.data.conversations import SUFFIXES, load_messages, read_conversations
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.pairs import load_pair, read_pairs
from lit_gpt.data.readers import Text
from lit_gpt.data.text_source import BadText, OnRead, TextSource
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.tokenizer.chat_template import ChatTemplate, EncodedConversation, Message, TemplateFailed
from lit_gpt.tokenizer.tokenizer import Tokenizer

DataFormat = Literal["text", "chat", "pairs"]


class DocumentEncoder(Protocol):
    """Turns the documents of a format into tokens."""

    def encode(self, text: str, where: str) -> Sequence[EncodedConversation]:
        """The tokens of one document, in one or several parts of which each is a document of the shards.

        Args:
            text: as the format's `read` gives it.
            where: its file and line, for errors.

        Raises:
            BadText: it cannot be encoded, or nothing of it counts.
        """

    def close(self) -> None:
        """End what was started."""


@dataclass(frozen=True)
class MaskedFormat:
    """A format whose shards have a loss mask.

    Attributes:
        what: a word for its documents.
        read: the documents of a source, each whole.
        encoder: what turns them into tokens, made in each process that tokenizes.
        generated: sources that are made here: name → the lines of JSON that `read` reads.
        suffixes: of the files that are read from a folder.
        parts: documents of the shards that each document becomes.
    """

    what: str
    read: Callable[[TextSource, OnRead], Iterator[Text]]
    encoder: Callable[[Tokenizer], DocumentEncoder]
    generated: Mapping[str, Callable[[], Iterable[str]]] = field(default_factory=dict)
    suffixes: tuple[str, ...] = SUFFIXES
    parts: int = 1


class ConversationEncoder:
    """Conversations by the chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._template = ChatTemplate(tokenizer)

    def encode(self, text: str, where: str) -> list[EncodedConversation]:
        """The conversation that `dump_messages` wrote; see `DocumentEncoder`."""
        return [self.encode_messages(load_messages(text), where)]

    def encode_messages(self, messages: Sequence[Message], where: str) -> EncodedConversation:
        """Tokens and mask of a conversation.

        Raises:
            BadText: the template refuses it, or no token counts.
        """
        try:
            encoded = self._template.encode(messages)
        except TemplateFailed as error:
            raise BadText(f"{where}: the chat template refuses the conversation: {error}") from error
        if not any(encoded.counts[1:]):
            raise BadText(f"{where}: by the chat template no token is the assistant's, so there is nothing to learn")
        return encoded

    def close(self) -> None:
        """End the process that renders."""
        self._template.close()


class PairEncoder(ConversationEncoder):
    """Pairs as two conversations, by the chat template of a tokenizer; what counts is the answers."""

    def encode(self, text: str, where: str) -> list[EncodedConversation]:
        """The pair that `dump_pair` wrote: the conversation with the chosen answer, and that with the rejected one."""
        prompt, *answers = load_pair(text)
        encoded = [self._encode_answer(prompt, answer, where) for answer in answers]
        if encoded[0].ids == encoded[1].ids:
            raise BadText(f"{where}: the chat template makes chosen and rejected equal: leave the pair out")
        return encoded

    def _encode_answer(self, prompt: Sequence[Message], answer: Sequence[Message], where: str) -> EncodedConversation:
        """The conversation, in which the assistant's turns of the prompt do not count."""
        ids, counts = self.encode_messages([*prompt, *answer], where)
        begins = [index for index, counted in enumerate(counts) if counted and not (index and counts[index - 1])]
        earlier = _answers_in(prompt)
        if len(begins) == earlier + _answers_in(answer):  # else two turns are one stretch: the prompt's cancel out
            counts[: begins[earlier]] = [False] * begins[earlier]
        return EncodedConversation(ids, counts)


def _answers_in(messages: Sequence[Message]) -> int:
    return sum(message.role == "assistant" for message in messages)


def _stdlib_chat() -> Iterator[str]:
    from lit_gpt.data.stdlib_chat import stdlib_conversations

    return (f'{{"messages": {_as_objects(messages)}}}' for messages in stdlib_conversations())


def _stdlib_pairs() -> Iterator[str]:
    from lit_gpt.data.stdlib_chat import stdlib_pairs

    for pair in stdlib_pairs():
        prompt, chosen, rejected = map(_as_objects, pair)
        yield f'{{"prompt": {prompt}, "chosen": {chosen}, "rejected": {rejected}}}'


def _as_objects(messages: Sequence[Message]) -> str:
    """Messages as OpenAI writes them."""
    return json.dumps([{"role": each.role, "content": each.content} for each in messages], ensure_ascii=False)


MASKED_FORMATS: dict[str, MaskedFormat] = {
    "chat": MaskedFormat(
        what="conversations",
        read=read_conversations,
        encoder=ConversationEncoder,
        generated={"stdlib-chat": _stdlib_chat},
    ),
    "pairs": MaskedFormat(
        what="pairs of answers",
        read=read_pairs,
        encoder=PairEncoder,
        generated={"stdlib-pairs": _stdlib_pairs},
        parts=2,
    ),
}
"""Name → format; "text" is none of them."""


def write_generated(source: TextSource, masked: MaskedFormat) -> None:
    """Write the file of a source that the format makes here, whole."""
    with atomic_write(source.path, "w") as file:
        file.writelines(line + "\n" for line in masked.generated[str(source.url)]())


def template_hash(tokenizer: Tokenizer) -> str:
    """The sha256 of a tokenizer's chat template, "" where it has none."""
    return "" if tokenizer.chat_template is None else hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()


def check_template(index: ShardIndex, tokenizer: Tokenizer, where: str | os.PathLike[str]) -> None:
    """Refuse a tokenizer with another chat template than the one that made the shards.

    Args:
        index: of a masked format.
        tokenizer: of its vocabulary.
        where: its path or name, for the message.

    Raises:
        UserError: naming the hashes.
    """
    found = template_hash(tokenizer)
    if found != index.template_sha256:
        raise UserError(
            f"{where}: its chat template has sha256 {found[:12] or 'none'}, the one that made the shards "
            f"{str(index.template_sha256)[:12]}: prepare them again in another folder"
        )
