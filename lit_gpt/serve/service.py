"""The served model with its name, tokenizer and worker, and the checks of requests against it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.generation.complete import encode_prompt
from lit_gpt.model.config import GPTConfig
from lit_gpt.generation.prompts import vocabulary_size
from lit_gpt.serve.api_errors import ApiError, bad_request
from lit_gpt.serve.prometheus import Metrics
from lit_gpt.serve.protocol import PromptBody, Sampling
from lit_gpt.serve.worker import Worker
from lit_gpt.tokenizer.ids import id_outside
from lit_gpt.tokenizer.tokenizer import Tokenizer

_LONG_TEXT = 4096
"""Characters from which on a text is tokenised in a thread: for shorter ones starting it takes longer."""


@dataclass(frozen=True)
class Service:
    """One served model.

    Attributes:
        name: in requests' `model`; a name and never a path.
        worker: runs its engine.
    """

    name: str
    config: GPTConfig
    tokenizer: Tokenizer
    worker: Worker
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.name:
            raise ApiError(404, "no such model here: GET /v1/models lists them", "model", "model_not_found")

    @property
    def n_vocab(self) -> int:
        """Ids 0 … n_vocab - 1 are those that a request may name and that can be generated."""
        return vocabulary_size(self.config, self.tokenizer)

    @property
    def special_names(self) -> dict[int, str]:
        """Id → name of the special tokens."""
        return {number: name for name, number in self.tokenizer.specials.items()}

    def token_text(self, token: int) -> str:
        r"""A token as OpenAI writes it: its text, `bytes:\xe4` if that is no whole character, a special one's name."""
        data = self.tokenizer.token_bytes(token)
        if not data:
            return self.special_names.get(token, "")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    async def encode(self, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[list[int]]:
        """Ids of each prompt, at least one each, all within the vocabulary.

        Raises:
            ApiError: 400.
        """
        if sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > _LONG_TEXT:
            encoded = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in prompts])
        else:
            encoded = [self._encode(prompt) for prompt in prompts]
        for ids in encoded:
            if not ids:
                raise bad_request("the prompt is empty, and this model has no token to start from", param)
            outside = id_outside(ids, self.n_vocab)
            if outside is not None:
                raise bad_request(f"token id {outside} is outside the vocabulary of {self.n_vocab}", param)
        return encoded

    def _encode(self, prompt: str | list[int]) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        return [self.tokenizer.eot_id] if not ids and self.tokenizer.eot_id is not None else ids

    async def tokenize(self, text: str, specials: bool) -> list[int]:
        """Ids of a text, with what has to stand before a prompt if `specials`."""
        encode = self._encode if specials and text else self.tokenizer.encode
        return encode(text) if len(text) <= _LONG_TEXT else await asyncio.to_thread(encode, text)

    def check_context_length(self, prompts: Sequence[list[int]], max_tokens: int, param: str = "max_tokens") -> None:
        """Refuse what does not fit into the context.

        Raises:
            ApiError: 400.
        """
        longest = max(len(ids) for ids in prompts)
        if longest + max_tokens > self.config.block_size:
            raise bad_request(
                f"the prompt's {longest} tokens and max_tokens={max_tokens} exceed this model's context of "
                f"{self.config.block_size}: shorten one of them",
                param,
                "context_length_exceeded",
            )

    def check_ids(self, request: Sampling) -> None:
        """Refuse ids outside the vocabulary, and settings that leave no token at all.

        Raises:
            ApiError: 400.
        """
        bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
        stops = request.stop_token_ids or []
        for name, values in (("logit_bias", list(bias)), ("stop_token_ids", stops)):
            outside = id_outside(values, self.n_vocab)
            if outside is not None:
                raise bad_request(f"{name} has {outside}, outside the vocabulary of {self.n_vocab}", name)
        never = {token for token, value in bias.items() if value <= -100}
        if request.min_tokens:
            never.update(stops)
        if (request.min_tokens or request.ignore_eos) and self.tokenizer.eot_id is not None:
            never.add(self.tokenizer.eot_id)
        if len(never) >= self.n_vocab:
            raise bad_request("these settings forbid every token of the vocabulary", "logit_bias")

    def card(self) -> dict[str, Any]:
        """This model's entry in `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lit_gpt",
            "max_model_len": self.config.block_size,
        }


def as_prompts(prompt: PromptBody) -> list[str | list[int]]:
    """OpenAI's four forms of `prompt` as a list of prompts.

    >>> as_prompts([1, 2]), as_prompts(["a", "b"]), as_prompts("a")
    ([[1, 2]], ['a', 'b'], ['a'])

    Raises:
        ApiError: 400 for an empty list.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("prompt is an empty list", "prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return list(prompt)


def model_name(source: str) -> str:
    """A name for what was loaded from `source`: no folders, and only characters that logs and URLs take as they are.

    >>> model_name("runs/version_3/last.ckpt"), model_name("openai-community/gpt2")
    ('last', 'gpt2')
    """
    last = source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".ckpt")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "lit_gpt"
