"""Conversations about Python's standard library, made from its documentation: the source "stdlib-chat"; and pairs.

Each conversation is about one definition, and no other conversation is: whichever conversations are held out, they are
about things that the others do not ask about. Text that documents several things is an answer for the first of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lit_gpt.data.pairs import PreferencePair
from lit_gpt.data.stdlib_definitions import Definition, library_definitions
from lit_gpt.tokenizer.chat_template import Message

STDLIB_CHAT, STDLIB_PAIRS = "stdlib-chat", "stdlib-pairs"
_LISTED = 10  # methods that an answer lists
_FOLLOW_UPS = 4  # one conversation in so many has a second question
Topic = Literal["summary", "signature", "module", "methods", "bases"]


@dataclass(frozen=True)
class _Phrases:
    """How a topic is asked about: forms with {path}, {name} and {kind}, and one that follows another question."""

    questions: tuple[str, ...]
    follow_up: str


_PHRASES: dict[Topic, _Phrases] = {
    "summary": _Phrases(
        (
            "What does `{path}` do?",
            "What is `{path}` for?",
            "Explain `{path}`.",
            "Tell me about the {kind} `{path}`.",
            "I found `{path}` in a program. What is it?",
            "In a few words: what is `{path}`?",
            "Describe the {kind} `{path}` of the standard library.",
            "`{path}` 是做什么的？",
        ),
        "What does it do?",
    ),
    "signature": _Phrases(
        (
            "What is the signature of `{path}`?",
            "How do I call `{path}`?",
            "Which parameters does `{path}` have?",
            "What can I pass to the {kind} `{path}`?",
            "Show me the arguments of `{path}`.",
            "`{path}` 的签名是什么？",
        ),
        "And its signature?",
    ),
    "module": _Phrases(
        (
            "Which module has `{name}`?",
            "In which module is the {kind} `{name}`?",
            "How do I import `{name}`?",
            "What must I import to use the {kind} `{name}`?",
            "`{name}` 在哪个模块里？",
        ),
        "How do I import it?",
    ),
    "methods": _Phrases(
        (
            "Which methods does `{path}` have?",
            "What can I do with an object of the class `{path}`?",
            "List the methods of `{path}`.",
            "`{path}` 有哪些方法？",
        ),
        "Which methods does it have?",
    ),
    "bases": _Phrases(
        (
            "What does `{path}` inherit from?",
            "Which are the base classes of `{path}`?",
            "`{path}` 继承自什么？",
        ),
        "What does it inherit from?",
    ),
}


def stdlib_conversations(root: Path | None = None) -> Iterator[list[Message]]:
    """Questions about the standard library with their answers, one conversation of one or two questions for each thing.

    Args:
        root: the folder of the library's sources; by default that of this Python, of which the result is a function.

    Raises:
        UserError: this Python comes without its sources.
    """
    for dialogue in _dialogues(library_definitions(root)):
        yield [message for turn in dialogue for message in _messages(turn)]


def stdlib_pairs(root: Path | None = None) -> Iterator[PreferencePair]:
    """The same conversations, whose last answer is preferred to the answer of another one to a question of its kind.

    Args:
        root: as of `stdlib_conversations`.

    Raises:
        UserError: this Python comes without its sources.
    """
    waiting: dict[tuple[Topic, int], list[_Turn]] = {}
    for dialogue in _dialogues(library_definitions(root)):
        key = dialogue[-1].topic, len(dialogue)
        before, waiting[key] = waiting.get(key), dialogue
        if before is not None and before[-1].answer != dialogue[-1].answer:
            *context, (question, chosen) = map(_messages, dialogue)
            prompt = [*(message for turn in context for message in turn), question]
            yield PreferencePair(prompt, [chosen], [Message("assistant", before[-1].answer)])


# Dialogues -------------------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    topic: Topic
    question: str
    answer: str


def _messages(turn: _Turn) -> tuple[Message, Message]:
    return Message("user", turn.question), Message("assistant", turn.answer)


def _dialogues(definitions: Iterable[Definition]) -> list[list[_Turn]]:
    """One for each definition that there is something to say about, in an order that mixes modules."""
    every = list(definitions)
    owners = Counter(definition.name for definition in every)
    told: set[str] = set()
    found = []
    for definition in every:
        answers = _answers(definition, is_unique=owners[definition.name] == 1)
        if answers.get("summary") and definition.summary in told:
            del answers["summary"]
        told.add(definition.summary)
        if answers:
            found.append((_number("order", definition), _dialogue(definition, answers)))
    return [dialogue for _, dialogue in sorted(found)]


def _dialogue(definition: Definition, answers: dict[Topic, str]) -> list[_Turn]:
    """One or two turns, of which the first asks for the summary, if there is one, at least every other time."""
    topics = list(answers)
    if "summary" in answers and _number("summary", definition) % 2:
        topics = ["summary"]
    first = topics[_number("topic", definition) % len(topics)]
    phrases = _PHRASES[first].questions
    form = phrases[_number("phrase", definition) % len(phrases)]
    question = form.format(path=definition.path, name=definition.name, kind=definition.kind)
    turns = [_Turn(first, question, answers[first])]
    others = [topic for topic in answers if topic != first]
    if others and _number("follow-up", definition) % _FOLLOW_UPS == 0:
        second = others[_number("second", definition) % len(others)]
        turns.append(_Turn(second, _PHRASES[second].follow_up, answers[second]))
    return turns


def _number(what: str, definition: Definition) -> int:
    """A number that looks random, of its own for each purpose, and the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{what} {definition.path}".encode(), digest_size=8).digest(), "big")


# Answers ---------------------------------------------------------------------------------------------------------


def _answers(definition: Definition, is_unique: bool) -> dict[Topic, str]:
    """The answers that a definition has, by topic.

    Args:
        definition: the thing asked about.
        is_unique: whether its name alone says what is meant.
    """
    writers: dict[Topic, Callable[[Definition], str]] = {
        "summary": _summary_answer,
        "signature": _signature_answer,
        "module": _module_answer if is_unique else lambda definition: "",
        "methods": _methods_answer,
        "bases": _bases_answer,
    }
    answers = {topic: write(definition) for topic, write in writers.items()}
    return {topic: answer for topic, answer in answers.items() if answer}


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _summary_answer(definition: Definition) -> str:
    if not definition.summary:
        return ""
    if definition.kind == "module":
        return f"`{definition.path}` is a module of the standard library. {definition.summary}"
    owner = definition.path.rpartition(".")[0]
    return f"`{definition.path}` is {_article(definition.kind)} of `{owner}`. {definition.summary}"


def _signature_answer(definition: Definition) -> str:
    if not definition.signature:
        return ""
    return f"The signature of the {definition.kind} is `{definition.module}.{definition.signature}`."


def _module_answer(definition: Definition) -> str:
    if definition.kind in ("module", "method", "property"):
        return ""
    return (
        f"The {definition.kind} `{definition.name}` is in the module `{definition.module}`: "
        f"`from {definition.module} import {definition.name}`."
    )


def _methods_answer(definition: Definition) -> str:
    names = definition.methods
    if len(names) < 2:
        return ""
    shown = _joined([f"`{name}`" for name in names[:_LISTED]])
    more = f" It has {len(names) - _LISTED} more." if len(names) > _LISTED else ""
    return f"The methods of `{definition.path}` are {shown}.{more}"


def _bases_answer(definition: Definition) -> str:
    if not definition.bases:
        return ""
    return f"The {definition.kind} `{definition.path}` inherits from {_joined([f'`{b}`' for b in definition.bases])}."


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
