"""Conversations as ids by a tokenizer's chat template, with a mask of what the assistant says.

The whole rendering is tokenised once. What is the assistant's is known in characters, from the template's generation
tags or from where its text stands, and never by comparing the ids of one rendering with those of a shorter one: a
token at the seam would count as both.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.chatml import has_generation_tags, with_chat_template
from lit_gpt.tokenizer.rendered_turns import (
    FIRST_CONTENT,
    GENERATION_BEGIN,
    GENERATION_END,
    Marks,
    Turns,
    find_turns,
)
from lit_gpt.tokenizer.split_rendering import SplitRendering, split_rendering
from lit_gpt.tokenizer.template_renderer import TemplateFailed, TemplateRenderer
from lit_gpt.tokenizer.tokenizer import EncodedParts, Tokenizer

__all__ = ["ChatTemplate", "EncodedConversation", "Message", "TemplateFailed", "with_chat_template"]

ASSISTANT = "assistant"
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
"""Special tokens by which chat models end a turn: one may have several, of which its template writes one."""
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant", or another that the template knows.
        content: its text, in which nothing is a special token, whatever it looks like.
    """

    role: str
    content: str


class EncodedConversation(NamedTuple):
    """The ids of a conversation.

    Attributes:
        ids: its tokens.
        counts: one for each id: whether it is of an assistant's turn, its end token included.
    """

    ids: list[int]
    counts: list[bool]


class ChatTemplate:
    """The chat template of a tokenizer, and the child process that renders it.

    Threads may share one. A copy in another process, by `fork` or `pickle`, starts a child of its own.

    Attributes:
        tokenizer: whose template it is.
        renderer: the child process.
    """

    def __init__(self, tokenizer: Tokenizer, renderer: TemplateRenderer | None = None) -> None:
        """The template of `tokenizer`, rendered by `renderer`, or by one of its own.

        Raises:
            UserError: if the tokenizer has no template.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                f'the tokenizer "{tokenizer.name}" has no chat template, its model only continues text: '
                "train it on conversations first, or choose a model for chat"
            )
        self.tokenizer = tokenizer
        self.renderer = renderer or TemplateRenderer()
        self._template = tokenizer.chat_template
        self._marks = Marks()
        self._typed = Marks()  # stand for special tokens' names in what somebody has typed; their number is the id
        name_of = {number: name for name, number in tokenizer.specials.items()}
        self._special_tokens = {
            "bos_token": "" if tokenizer.bos_id is None else name_of.get(tokenizer.bos_id, ""),
            "eos_token": "" if tokenizer.eot_id is None else name_of.get(tokenizer.eot_id, ""),
        }
        self._names = _any_of(tokenizer.specials)
        self._marks_and_names = re.compile(f"{self._typed.pattern}|{self._names.pattern}")
        self._end = re.compile(rf"\s*({self._names.pattern})")

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.tokenizer,)

    def close(self) -> None:
        """End the child process; the next conversation would start another."""
        self.renderer.close()

    # Encoding ----------------------------------------------------------------------------------------------------

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's turn begins. Blocks while the child renders.

        Raises:
            TemplateFailed: if the template refuses the messages, fails, or does not end.
        """
        (text,) = self._render([self._shielded(messages)], add_generation_prompt=True)
        return self.tokenizer.encode_parts(self._split(text).parts).ids

    def encode(self, messages: Sequence[Message]) -> EncodedConversation:
        """Ids of a whole conversation, and which of them are the assistant's. Blocks while the child renders.

        What counts is what stands between the template's generation tags, where it has some; else the text of each
        message of the assistant and the special token that ends its turn. A template may strip the messages' texts.

        Raises:
            TemplateFailed: as `encode_prompt`, or if the template changes a message's text otherwise.
        """
        text, turns = self._find_turns(messages)
        counted = turns.generated
        if not has_generation_tags(self._template):
            spans = zip(messages, turns.contents)
            counted = [(start, self._turn_end(text, end)) for one, (start, end) in spans if one.role == ASSISTANT]
        split = self._split(text)
        encoded = self.tokenizer.encode_parts(split.parts)
        where = [(split.position(start), split.position(end, is_end=True)) for start, end in counted]
        return EncodedConversation(encoded.ids, _counts(encoded, where))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an assistant's turn; generation stops at them. Blocks, once, while the child renders."""
        return tuple(dict.fromkeys([*self._written_end, *known_end_ids(self.tokenizer)]))

    @cached_property
    def _written_end(self) -> tuple[int, ...]:
        """The special token that the template puts after what the assistant says; none where there is none."""
        try:
            text, turns = self._find_turns([Message("user", "a"), Message(ASSISTANT, "b")])
        except TemplateFailed:
            return ()
        found = self._end.match(text, turns.contents[-1][1])
        return (self.tokenizer.specials[found[1]],) if found else ()

    def _turn_end(self, text: str, end: int) -> int:
        """Where a turn ends whose text ends at `end`: after the token that ends it, and spaces before that."""
        found = self._end.match(text, end)
        return found.end() if found and self.tokenizer.specials[found[1]] in self.end_ids else end

    # Rendering ---------------------------------------------------------------------------------------------------

    def _find_turns(self, messages: Sequence[Message]) -> tuple[str, Turns]:
        """The rendering, and what of it is whose."""
        shielded = self._shielded(messages)
        marked = [Message(message.role, self._marks(FIRST_CONTENT + index)) for index, message in enumerate(messages)]
        text, with_marks = self._render([shielded, marked], add_generation_prompt=False)
        contents, roles = [message.content for message in shielded], [message.role for message in messages]
        return text, find_turns(text, with_marks, self._marks, contents, roles)

    def _shielded(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with a mark for each special token's name that is in what somebody has typed.

        Raises:
            TemplateFailed: for no message, and a role that is no word, with which a message could leave its turn.
        """
        if not messages:
            raise TemplateFailed("there is no message")
        odd = next((message.role for message in messages if not _ROLE.fullmatch(message.role)), None)
        if odd is not None:
            raise TemplateFailed(f"the role {brief(odd)} is no word")
        specials = self.tokenizer.specials
        return [
            Message(message.role, self._names.sub(lambda name: self._typed(specials[name[0]]), _valid(message.content)))
            for message in messages
        ]

    def _render(self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool) -> list[str]:
        """The text of each of them; marks stand in all but the first for the template's generation tags."""
        absent = {"tools": None, "documents": None}  # as transformers has them: some templates ask for none
        shared = {**self._special_tokens, **absent, "add_generation_prompt": add_generation_prompt}
        renderings = [
            {"messages": [{"role": one.role, "content": one.content} for one in messages], **shared}
            for messages in conversations
        ]
        generation_marks = (self._marks(GENERATION_BEGIN), self._marks(GENERATION_END))
        texts = self.renderer.render_all(self._template, renderings, generation_marks)
        return [_valid(text) for text in texts]

    def _split(self, text: str) -> SplitRendering:
        return split_rendering(text, self._marks_and_names, self.tokenizer)


def known_end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the special tokens that are known to end a turn, without a look at the template."""
    return [tokenizer.specials[name] for name in _TURN_ENDS if name in tokenizer.specials]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches one of `names`, the longest of those that begin alike."""
    ordered = sorted(filter(None, names), key=len, reverse=True)
    if not ordered:
        return re.compile("(?!)")
    first = "".join(sorted({re.escape(name[0]) for name in ordered}))
    # Hundreds of names take long to try at each character: their first one rules most of them out.
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, ordered))})")


def _valid(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, of which no tokenizer makes anything else."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _counts(encoded: EncodedParts, counted: Sequence[tuple[int, int]]) -> list[bool]:
    """For each id whether it has a character of the spans `counted`."""
    counts = [False] * len(encoded.ids)
    for start, end in counted:
        first, past = bisect_right(encoded.ends, start), bisect_left(encoded.starts, end)
        for index in range(first, past):
            counts[index] = True
    return counts
