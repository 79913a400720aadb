"""`POST /v1/continuations`: what followed the end of a text in the tokens that the model was trained on, and how often.

It stands beside the model's own distribution of `/v1/next_token`: whether a word comes from what was read or from what
was learnt of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pydantic import BaseModel, Field

from lit_gpt.data.continuations import Continuations, find_continuations
from lit_gpt.data.shard_folder import load_index, open_local_split
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError
from lit_gpt.serve.api_errors import ApiError
from lit_gpt.serve.protocol import Body, Ids, Text
from lit_gpt.serve.service import Service
from lit_gpt.tokenizer.tokenizer import Tokenizer

_EXCERPT = 24
"""Tokens on either side of an occurrence."""


class ContinuationsRequest(Body):
    """`POST /v1/continuations`.

    Attributes:
        generated: ids already written after the prompt.
        limit: tokens to return, the most frequent first; the rest are summed up.
        excerpts: occurrences to show in their text.
    """

    model: str | None = None
    prompt: Text | Ids
    generated: Ids = Field([])
    limit: int = Field(10, ge=1, le=200)
    excerpts: int = Field(3, ge=0, le=20)


class FollowingToken(BaseModel):
    """A token that came next, how often, and its share of all occurrences."""

    id: int
    text: str
    count: int
    share: float


class Excerpt(BaseModel):
    """An occurrence in its document: `before` ends with the suffix; `position` counts tokens of the shard."""

    before: str
    next: str
    after: str
    shard: str
    position: int


class ContinuationsResponse(BaseModel):
    """What followed the longest suffix of a text that occurs in the training tokens.

    Attributes:
        suffix: that suffix.
        suffix_tokens: its length; 0 if not even the last token occurs.
        occurrences: how often it occurs with a token after it.
        next: what came next, the most frequent first.
        rest: occurrences with a token that is not listed.
        excerpts: some of the occurrences.
        tokens_searched: of the training split.
    """

    model: str
    suffix: str
    suffix_tokens: int
    occurrences: int
    next: list[FollowingToken]
    rest: int
    excerpts: list[Excerpt]
    tokens_searched: int


def open_training_text(folder: str, tokenizer: Tokenizer) -> TokenStream:
    """The training tokens of a prepared folder.

    Raises:
        UserError: if it is none, or of another tokenizer.
    """
    index = load_index(folder)
    if index.tokenizer_hash not in (None, tokenizer.hash):
        raise UserError(
            f"data_path={folder} holds shards of the tokenizer {index.tokenizer}, the model has {tokenizer.name}: name "
            "the folder that it was trained on"
        )
    return open_local_split(index, "train", folder)


async def continuations(service: Service, request: ContinuationsRequest) -> dict[str, Any]:
    """The answer to a request, as `ContinuationsResponse` describes it.

    Raises:
        ApiError: 400 for ids outside the vocabulary, 404 where no training tokens are served.
    """
    stream = service.training_text
    if stream is None:
        raise ApiError(404, "no training text is served: start with --data_path FOLDER", code="no_training_text")
    (prompt,) = await service.encode([request.prompt])
    if request.generated:
        await service.encode([request.generated], "generated")
    text = prompt + request.generated
    found = await service.in_thread(find_continuations, text, stream)
    return await service.in_thread(_answer, service, request, text, stream, found)


def _answer(
    service: Service, request: ContinuationsRequest, text: Sequence[int], stream: TokenStream, found: Continuations
) -> dict[str, Any]:
    listed = list(found.counts.items())[: request.limit]
    following = [
        {"id": token, "text": service.token_text(token), "count": count, "share": count / found.occurrences}
        for token, count in listed
    ]
    # Spread over the stream: neighbours are often of one document
    positions = found.positions.tolist()
    chosen = [positions[len(positions) * i // request.excerpts] for i in range(min(request.excerpts, len(positions)))]
    return {
        "model": service.name,
        "suffix": service.tokenizer.decode(list(text)[len(text) - found.length :]),
        "suffix_tokens": found.length,
        "occurrences": found.occurrences,
        "next": following,
        "rest": found.occurrences - sum(count for _, count in listed),
        "excerpts": [_excerpt(service.tokenizer, stream, position, found.length) for position in chosen],
        "tokens_searched": len(stream),
    }


def _excerpt(tokenizer: Tokenizer, stream: TokenStream, position: int, length: int) -> dict[str, Any]:
    """The text around `position`, the token that came next, as far as its document goes."""
    start = max(0, position - max(length, _EXCERPT))
    ids = stream.read(start, min(position + 1 + _EXCERPT, len(stream)) - start).tolist()
    before, token, after = ids[: position - start], ids[position - start], ids[position - start + 1 :]
    if tokenizer.eot_id in before:
        before = before[len(before) - before[::-1].index(tokenizer.eot_id) :]
    if token == tokenizer.eot_id:
        after = []
    elif tokenizer.eot_id in after:
        after = after[: after.index(tokenizer.eot_id)]
    ends = list(accumulate(shard.tokens for shard in stream.shards))
    number = bisect_right(ends, position)
    return {
        "before": tokenizer.decode(before),
        "next": tokenizer.decode([token]),
        "after": tokenizer.decode(after),
        "shard": stream.shards[number].name,
        "position": position - (ends[number] - stream.shards[number].tokens),
    }
