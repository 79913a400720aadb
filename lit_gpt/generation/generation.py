"""What a strategy works with: the verbs over its rows, its processors, and where its tokens go."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import FinishReason, Output, Token
from lit_gpt.generation.rows import ForwardRequest, Row, Rows
from lit_gpt.generation.sampling import Sampler, ranked
from lit_gpt.generation.stopping import Continuation, Ending
from lit_gpt.tokenizer.tokenizer import Tokenizer

StrategySteps = Generator[list[ForwardRequest], list[ForwardRequest], None]
"""A strategy: yields what to feed, is resumed with the same feeds when all of them are done."""

Strategy = Callable[["Generation"], StrategySteps]

Value = Callable[[list[int]], float]
"""Rates a text, given as ids, prompt included: for `mcts`, larger is better, best within [0, 1]."""

_PIECE = 64
"""Tokens of a prompt whose logits exist at once when all of them are wanted."""


class Generation:
    """One continuation in the making (or one beam search, which makes several).

    Attributes:
        request: id of the request it belongs to.
        index: which of the request's continuations.
        prompt: ids, at least one.
        generation_config: the settings.
        rows: rows of the model.
        draft: rows of the draft model, if there is one.
        ending: when it ends.
        sampler: what its next token's logits go through.
        value: rates a text, for `mcts`; None for the model's own likelihood.
        strategy: what decides its tokens.
        tokenizer: None for bare ids.
        feeds: what it waits for.
        closed: whether it has ended.
    """

    def __init__(
        self,
        request: int,
        index: int,
        prompt: list[int],
        generation_config: GenerationConfig,
        rows: Rows,
        ending: Ending,
        sampler: Sampler,
        strategy: Strategy,
        tokenizer: Tokenizer | None = None,
        draft: Rows | None = None,
        value: Value | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.prompt = prompt
        self.generation_config = generation_config
        self.rows = rows
        self.draft = draft
        self.ending = ending
        self.sampler = sampler
        self.strategy = strategy
        self.value = value
        self.tokenizer = tokenizer
        self.feeds: list[ForwardRequest] = []
        self.closed = False
        self._continuations = [Continuation(ending, tokenizer)]
        self._scores: list[float | None] = [None]
        self._prompt_tokens: list[Token] | None = None
        self._own: list[Row] = []
        self._error: str | None = None
        self._steps: StrategySteps | None = None

    # --- verbs ----------------------------------------------------------------------------------------------------

    def open(self, ids: Sequence[int] = (), reuse: bool = True, home: Rows | None = None) -> Row:
        """A new row holding `ids`, of the model or of `home`."""
        row = (home or self.rows).open(ids, reuse)
        self._own.append(row)
        return row

    def fork(self, row: Row) -> Row:
        """A new row equal to `row`."""
        twin = row.home.fork(row)
        self._own.append(twin)
        return twin

    def truncate(self, row: Row, length: int) -> None:
        """Cut `row` to its first `length` tokens."""
        row.home.truncate(row, length)

    def free(self, row: Row) -> None:
        """Give `row` back."""
        self._own.remove(row)
        row.home.free(row)

    def read_prompt(
        self, sampler: Sampler | None = None, hidden: bool = False
    ) -> Generator[list[ForwardRequest], list[ForwardRequest], tuple[ForwardRequest, Tensor | None]]:
        """Prefill: a row that has read the prompt.

        Returns:
            the prompt's last feed, with its logits (1, V); and the hidden states of all of it, (T, C), if `hidden`.
        """
        scored = self.generation_config.prompt_logprobs is not None and self.index == 0
        if not scored and not hidden:
            (feed,) = yield [ForwardRequest(self.open(self.prompt), sampler=sampler)]
            return feed, None
        row = self.open(reuse=False)
        ids = self.prompt[-self.rows.capacity :] if not scored else self.prompt
        states, before = [], None
        for piece in self._pieces(ids):
            last = len(row.ids) + len(piece) == len(ids)
            (feed,) = yield [
                ForwardRequest(row, piece, num_logits=len(piece), hidden=hidden, sampler=sampler if last else None)
            ]
            if scored:
                self._score_prompt(piece, before, feed.logits)
            before = feed.logits[-1:]
            states.append(feed.states)
        feed.logits = feed.logits[-1:]
        return feed, torch.cat(states) if hidden else None

    def _pieces(self, ids: list[int]) -> list[list[int]]:
        """Pieces that fit into the window; past its end every token has a window of its own."""
        within, beyond = ids[: self.rows.capacity], ids[self.rows.capacity :]
        return [within[i : i + _PIECE] for i in range(0, len(within), _PIECE)] + [[token] for token in beyond]

    def _score_prompt(self, piece: list[int], before: Tensor | None, logits: Tensor) -> None:
        """Log-probabilities of `piece`, from the (1, V) logits before it and its own (n, V)."""
        n = self.generation_config.prompt_logprobs or 0
        if self._prompt_tokens is None or before is None:
            self._prompt_tokens = [Token(piece[0])]
            piece, rows = piece[1:], logits[:-1]
        else:
            rows = torch.cat([before, logits[:-1]])
        for token, row in zip(piece, rows):
            logprob, top = ranked(row, token, n)
            self._prompt_tokens.append(Token(token, logprob, top=top))

    # --- results --------------------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.ending.limit - len(self._continuations[0].ids)

    def ends(self, path: Sequence[int]) -> bool:
        """Whether the continuation would end with, or before, the last token of `path`."""
        return self._continuations[0].would_end(path)

    def emit(self, token: Token) -> bool:
        """The next token is decided; whether the continuation ends with it."""
        self.sampler.observe(token.id)
        return self._continuations[0].push(token)

    def deliver(self, hypotheses: list[tuple[list[Token], float]]) -> None:
        """The results of a search, the best first, with their scores."""
        self._continuations = [Continuation(self.ending, self.tokenizer) for _ in hypotheses]
        self._scores = [score for _, score in hypotheses]
        for continuation, (tokens, _) in zip(self._continuations, hypotheses):
            for token in tokens:
                continuation.push(token)
            if continuation.finish_reason is None:
                continuation.finish("length")

    # --- the engine's side ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; `feeds` is then what to compute first, or the run is over."""
        self._steps = self._all()
        self._take(next(self._steps, None))

    def resume(self) -> None:
        """Go on after all `feeds` are done."""
        assert self._steps is not None
        try:
            self._take(self._steps.send(self.feeds))
        except StopIteration:
            self._take(None)

    def _all(self) -> StrategySteps:
        if self.ending.limit > 0:
            yield from self.strategy(self)
            return
        if self.generation_config.prompt_logprobs is not None and self.index == 0:
            yield from self.read_prompt()
        self._continuations[0].finish("length")

    def _take(self, feeds: list[ForwardRequest] | None) -> None:
        self.feeds = feeds or []
        for feed in self.feeds:
            feed.row.home.begin(feed)
        if feeds is None:
            self._close()

    def stop(self, reason: FinishReason, error: str | None = None) -> None:
        """End it from outside: it was cancelled, or it failed."""
        for continuation in self._continuations:
            continuation.finish(reason)
        self._error = error
        self._close(forget=error is not None)

    def _close(self, forget: bool = False) -> None:
        if self._steps is not None:
            self._steps.close()
        for row in self._own:
            row.home.free(row, forget)
        self._own, self.feeds, self.closed = [], [], True

    def news(self) -> list[Output]:
        """What is new since the last call."""
        outputs = []
        for i, continuation in enumerate(self._continuations):
            tokens, text = continuation.take()
            if not tokens and not text and not self.closed:
                continue
            output = Output(self.request, self.index + i, tokens, text, continuation.finish_reason, self._scores[i])
            if i == 0:
                output.prompt, self._prompt_tokens = self._prompt_tokens, None
                output.error = self._error
            outputs.append(output)
        return outputs

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"token {len(self._continuations[0].ids) + 1} of continuation {self.index}"
