"""A conversation with a model: its turns, its settings, and the answers, which are generated piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.generation.complete import Completion, stream_outputs
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Output
from lit_gpt.generation.replay import replay_steps
from lit_gpt.generation.trace import Step
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message, TemplateFailed

_ANSWER_SHARE = 4
"""One part in so many of the context is kept for the answer, if that much is asked for."""

_SEED_BITS = 32


@dataclass(frozen=True)
class Exchange:
    """A message of the user and the answer to it.

    Attributes:
        question: the message.
        prompt_ids: what the model read: the conversation until here, in the template.
        generation_config: the settings, with the seed that the answer was drawn with.
        completion: the answer; its finish_reason is `cancelled` if it was stopped.
    """

    question: str
    prompt_ids: list[int]
    generation_config: GenerationConfig
    completion: Completion = field(default_factory=Completion)


class ChatSession:
    """A conversation.

    Attributes:
        settings: how to draw the answers.
        system: the system message, or None.
        exchanges: what was said.
        left_out: how many of the first exchanges the model no longer reads, since the context is full.
    """

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        generation_config: GenerationConfig,
        system: str | None = None,
    ) -> None:
        """A conversation that has not begun.

        Args:
            engine: of the model, for this conversation alone.
            template: of its tokenizer.
            generation_config: settings of strategy `sample`; a seed of None draws a fresh one for each answer.
            system: the system message, checked by `check_system` already.
        """
        self._engine = engine
        self._template = template
        ends = [*generation_config.stop_token_ids, *template.end_ids]
        self.settings = replace(generation_config, overflow="stop", stop_token_ids=ends)
        self.system = system
        self.exchanges: list[Exchange] = []
        self.left_out = 0
        self._retries = 0

    @property
    def context(self) -> int:
        """Tokens that the model reads at most, the answer included."""
        return self._engine.config.block_size

    # --- answers --------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> Generator[str, None, None]:
        """Answer a message, piece by piece; pieces may be empty.

        What has been written when the reader closes it is the answer; if that is no token, or the model fails, the
        conversation stays as it was.

        Raises:
            UserError: if the message does not fit or the template refuses the conversation; at once.
            RuntimeError: if the model fails.
        """
        answer = self._start(self.exchanges, question, 0)
        self._retries = 0
        return answer

    def retry(self) -> Generator[str, None, None]:
        """Answer the last message again, with the next seed. The old answer is there until the new one is.

        Raises:
            UserError, RuntimeError: as `ask`, or if there is no answer.
        """
        if not self.exchanges:
            raise UserError("there is no answer to try again: write a message first")
        answer = self._start(self.exchanges[:-1], self.exchanges[-1].question, self._retries + 1)
        self._retries += 1
        return answer

    def _start(self, before: list[Exchange], question: str, retries: int) -> Generator[str, None, None]:
        prompt_ids, self.left_out = self._fit(before, question)
        seed = self.settings.seed
        seed = secrets.randbits(_SEED_BITS) if seed is None else seed + retries
        exchange = Exchange(question, prompt_ids, replace(self.settings, seed=seed))
        self._engine.cancel_all()  # an answer that nobody began to read
        outputs = stream_outputs(self._engine, prompt_ids, exchange.generation_config)
        return self._pieces(before, exchange, outputs)

    def _pieces(
        self, before: list[Exchange], exchange: Exchange, outputs: Generator[Output, None, None]
    ) -> Generator[str, None, None]:
        completion = exchange.completion
        with closing(outputs):
            try:
                for output in outputs:
                    completion.add(output)
                    yield output.text
            except GeneratorExit:
                completion.finish_reason = completion.finish_reason or "cancelled"
                raise
            finally:
                if completion.tokens and completion.finish_reason is not None:
                    self.exchanges = [*before, exchange]

    def _fit(self, before: Sequence[Exchange], question: str) -> tuple[list[int], int]:
        """The prompt, and how many of the exchanges before it are not in it.

        The oldest are left out when the context has no space for an answer, then at once until half of it is free:
        each time the model has to read all that is left again.
        """
        self._check_length(question)
        left_out = min(self.left_out, len(before))
        reserve = min(self.settings.max_new_tokens, self.context // _ANSWER_SHARE)
        ids = self._encode(before[left_out:], question)
        if len(ids) + reserve > self.context:
            while left_out < len(before) and len(ids) > self.context // 2:
                left_out += 1
                ids = self._encode(before[left_out:], question)
        if len(ids) >= self.context:
            system = "" if self.system is None else " and the system message"
            raise UserError(
                f"with this message{system} the prompt has {len(ids)} tokens and leaves none of the model's context of "
                f"{self.context} for an answer: shorten it"
            )
        return ids, left_out

    def _check_length(self, text: str) -> None:
        """Refuse a text that cannot fit, however it is tokenised, before it is."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None or tokenizer.normalization is not None:
            return
        least = -(-len(text) // tokenizer.longest_token)
        if least > self.context:
            raise UserError(
                f"the message's {len(text)} characters are at least {least} tokens, the model's context is "
                f"{self.context}: shorten it"
            )

    def _encode(self, before: Sequence[Exchange], question: str) -> list[int]:
        system = [] if self.system is None else [Message("system", self.system)]
        turns = [*system, *_turns(before), Message("user", question)]
        return encode_prompt(self._template, turns)

    # --- the conversation and its settings ------------------------------------------------------------------------

    def undo(self) -> str:
        """Take the last message and its answer back; the message.

        Raises:
            UserError: if there is none.
        """
        if not self.exchanges:
            raise UserError("there is nothing to take back: the conversation has not begun")
        *self.exchanges, last = self.exchanges
        self.left_out = self._retries = 0  # what was left out may fit again
        return last.question

    def clear(self) -> None:
        """Forget what was said; the settings and the system message stay."""
        self.exchanges, self.left_out, self._retries = [], 0, 0

    def change(self, **settings: Any) -> list[str]:
        """Change settings for the answers to come.

        Returns:
            One line for each setting without effect.

        Raises:
            UserError: for a value that is wrong; nothing has changed then.
        """
        changed = replace(self.settings, **settings)
        remarks = changed.check()
        self.settings, self._retries = changed, 0
        return remarks

    def set_system(self, text: str | None) -> None:
        """Change the system message, None for no system message.

        Raises:
            UserError: as `check_system`; nothing has changed then.
        """
        if text is not None:
            check_system(self._template, text, self.context)
        self.system = text

    def messages(self) -> list[Message]:
        """The whole conversation, with what the model no longer reads."""
        system = [] if self.system is None else [Message("system", self.system)]
        return [*system, *_turns(self.exchanges)]

    def trace(self) -> list[Step]:
        """How each token of the last answer was chosen.

        Raises:
            UserError: if there is no answer.
        """
        if not self.exchanges:
            raise UserError("there is no answer to trace: write a message first")
        last = self.exchanges[-1]
        return replay_steps(self._engine, last.prompt_ids, last.completion.ids, last.generation_config)


def _turns(exchanges: Sequence[Exchange]) -> list[Message]:
    pairs = [(Message("user", one.question), Message("assistant", one.completion.text)) for one in exchanges]
    return [message for pair in pairs for message in pair]


def encode_prompt(template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's turn begins.

    Raises:
        UserError: if the template refuses it.
    """
    try:
        return template.encode_prompt(messages)
    except TemplateFailed as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from error


def check_system(template: ChatTemplate, text: str, context: int) -> None:
    """Refuse a system message that this model cannot have.

    Args:
        template: of the model.
        text: the message.
        context: tokens that the model reads at most.

    Raises:
        UserError: if the template has no system messages, or it leaves no space for a conversation.
    """
    n = len(encode_prompt(template, [Message("system", text), Message("user", "?")]))
    if n >= context:
        raise UserError(
            f"the system message makes a prompt of {n} tokens, the model's context is {context}: shorten it"
        )
