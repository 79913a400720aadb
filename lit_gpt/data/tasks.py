"""Questions with choices and cloze texts from JSON lines, and the texts of them whose likelihood a model is asked for.

A text is cut into a context and a continuation as lm-evaluation-harness does it (0.4.13, `TemplateLM.loglikelihood` and
`HFLM._loglikelihood_tokens`), so that both score the same tokens after the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.data.readers import check_unicode, json_lines, readable
from lit_gpt.data.text_source import BadText, TextSource
from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.tokenizer import Tokenizer

CHOICES_EXAMPLE = '{"query": "…", "choices": ["…", "…"], "gold": 0}'
CLOZE_EXAMPLE = '{"context": "…", "continuation": "…"}'
DELIMITER = " "
"""Between a query and each of its choices, as in lm-evaluation-harness, unless the line has a "target_delimiter"."""


class Question(NamedTuple):
    """One line of a file of tasks.

    Attributes:
        where: its file and line, for errors.
        context: what comes before.
        continuations: the texts whose likelihood after it is asked for: each choice with the delimiter, or that of a
            cloze text.
        choices: without the delimiter; none of a cloze text.
        gold: number of the right choice; None for a cloze text.
    """

    where: str
    context: str
    continuations: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold: int | None = None


class ScoredText(NamedTuple):
    """A text of which the last tokens are scored.

    Attributes:
        ids: at most one more than the model's context: the last is only predicted.
        scored: how many of them, from the end.
        is_cut: whether more tokens came before, which the model's context has no space for.
    """

    ids: list[int]
    scored: int
    is_cut: bool


def read_questions(path: str) -> list[Question]:
    """The questions of a file of JSON lines, in order.

    Raises:
        UserError: no such file, or it has none.
        BadText: not JSON lines, or a line that is no question; the message names file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"--tasks {path}: no such file: name one with a question on each line, {CHOICES_EXAMPLE}")
    source = TextSource(Path(path), path)
    with readable(source):
        lines = json_lines(source, lambda count: None, CHOICES_EXAMPLE)
        questions = [to_question(values, where) for values, where in lines]
    if not questions:
        raise UserError(f"--tasks {path}: it has no questions: write one on each line, {CHOICES_EXAMPLE}")
    return questions


def to_question(values: dict[str, Any], where: str) -> Question:
    """A question from one object of JSON; `Any`, since nothing is known of it. Other fields are ignored.

    Args:
        values: the object.
        where: its file and line, for errors.

    Raises:
        BadText: a field is missing or has a value that it cannot have.
    """
    has_choices, is_cloze = ({first, second} & values.keys() for first, second in _FIELDS)
    if has_choices and is_cloze:
        raise BadText(f"{where} is a question and a cloze text at once: write {CHOICES_EXAMPLE} or {CLOZE_EXAMPLE}")
    if is_cloze:
        context = _text(values, "context", where, CLOZE_EXAMPLE)
        return Question(where, context, (_text(values, "continuation", where, CLOZE_EXAMPLE, may_be_empty=False),))
    if not has_choices:
        raise BadText(
            f'{where} has no "query" with "choices", and no "context" with a "continuation", it has '
            f"{brief(list(values))}: write {CHOICES_EXAMPLE} or {CLOZE_EXAMPLE}"
        )
    query = _text(values, "query", where, CHOICES_EXAMPLE)
    choices = _choices(values, where)
    delimiter = DELIMITER
    if "target_delimiter" in values:
        delimiter = _text(values, "target_delimiter", where, '"target_delimiter": ""')
    gold = values.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise BadText(
            f'{where}: "gold" is {brief(gold)}, not the number of one of its {len(choices)} choices: write 0 for the '
            f"first, up to {len(choices) - 1}"
        )
    return Question(where, query, tuple(delimiter + choice for choice in choices), choices, gold)


_FIELDS = (("query", "choices"), ("context", "continuation"))


def _choices(values: dict[str, Any], where: str) -> tuple[str, ...]:
    choices = values.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadText(f"{where}: choices is {brief(choices)}, not a list of two texts or more: write {CHOICES_EXAMPLE}")
    numbered = {f"choice {number}": choice for number, choice in enumerate(choices)}
    return tuple(_text(numbered, name, where, CHOICES_EXAMPLE, may_be_empty=False) for name in numbered)


def _text(values: dict[str, Any], name: str, where: str, example: str, may_be_empty: bool = True) -> str:
    """A field that is text; raises BadText."""
    value = values.get(name)
    if not isinstance(value, str):
        found = f"is {brief(value)}, not text" if name in values else "is missing"
        raise BadText(f"{where}: {name} {found}: write {example}")
    if not value and not may_be_empty:
        raise BadText(f"{where}: {name} is empty, so there is nothing to score: write {example}")
    check_unicode(value, f"{where}: {name}")
    return value


def encode_questions(questions: Sequence[Question], tokenizer: Tokenizer, block_size: int) -> list[ScoredText]:
    """The texts of all questions, in their order: one for each continuation.

    Args:
        questions: of a file.
        tokenizer: the model's.
        block_size: T, the most tokens that the model reads.

    Raises:
        BadText: a continuation that has no token of its own, or more than T; or an empty context, where the tokenizer
            has nothing to put there.
    """
    return [text for question in questions for text in _encode(question, tokenizer, block_size)]


def _encode(question: Question, tokenizer: Tokenizer, block_size: int) -> list[ScoredText]:
    """The texts of one question.

    Spaces at the end of a context belong to what follows, for that is where most tokenizers put them. What follows is
    the tokens of the whole text after as many as the context alone has.
    """
    context = question.context.rstrip()
    spaces = question.context[len(context) :]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    before = start + tokenizer.encode(context) if context else _empty_context(question, tokenizer)
    texts = []
    for number, continuation in enumerate(question.continuations):
        if context:
            after = (start + tokenizer.encode(context + spaces + continuation))[len(before) :]
        else:
            after = tokenizer.encode(spaces + continuation)
        name = f"choice {number}" if question.choices else "the continuation"
        if not after:
            raise BadText(
                f"{question.where}: {name} has no token of its own after what comes before: let it begin with a space, "
                "or the text before it end with one"
            )
        if len(after) > block_size:
            raise BadText(
                f"{question.where}: {name} has {len(after)} tokens, the model's context is {block_size}: shorten it"
            )
        ids = before + after
        texts.append(ScoredText(ids[-(block_size + 1) :], len(after), len(ids) > block_size + 1))
    return texts


def _empty_context(question: Question, tokenizer: Tokenizer) -> list[int]:
    """What stands for no context: the token that begins every text, or else that between documents."""
    first = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise BadText(
            f"{question.where}: there is nothing before what is to be scored, and the tokenizer has no end-of-text to "
            "start from: write a context"
        )
    return [first]
