"""The served model with its name, tokenizer and worker, and the checks of requests against it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from lit_gpt.data.token_stream import TokenStream
from lit_gpt.generation.complete import encode_prompt
from lit_gpt.generation.prompts import vocabulary_size
from lit_gpt.model.config import GPTConfig
from lit_gpt.serve.api_errors import ApiError, bad_request
from lit_gpt.serve.prometheus import Metrics
from lit_gpt.serve.protocol import PromptBody, Sampling
from lit_gpt.serve.worker import Worker
from lit_gpt.tokenizer.chat_template import ChatTemplate
from lit_gpt.tokenizer.ids import id_outside
from lit_gpt.tokenizer.template_renderer import TemplateRenderer
from lit_gpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lit_gpt.convert.adapters import Adapter

_LONG_TEXT = 4096
"""Characters, or ids, from which on prompts are handled on a thread: for fewer starting it takes longer."""


_TEXT_THREADS = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One served model.

    Attributes:
        name: in requests' `model`; a name and never a path.
        worker: runs its engine.
        templates: renders its chat template.
        threads: for work on texts that would hold up the event loop; few, and what does not fit waits.
        training_text: the tokens that the model was trained on, where they are served.
        sample_prompts: texts to begin with that suit the model; the page opens with the first.
        adapter: the number by which the engine knows it; 0 for the base.
        adapters: the models that share its base and its engine.
        frozen_sha256: of the manifest of a frozen model; None for another.
    """

    name: str
    config: GPTConfig
    tokenizer: Tokenizer
    worker: Worker
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    templates: TemplateRenderer = field(default_factory=TemplateRenderer)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_TEXT_THREADS, "text"))
    training_text: TokenStream | None = None
    sample_prompts: tuple[str, ...] = ()
    adapter: int = 0
    adapters: tuple[Service, ...] = ()
    frozen_sha256: str | None = None

    def with_adapters(self, adapters: Mapping[str, Adapter]) -> Service:
        """The same with these models beside it, by name, in the engine's order."""
        beside = [
            replace(
                self,
                name=name,
                adapter=number,
                config=adapter.config,
                tokenizer=adapter.tokenizer or self.tokenizer,
                frozen_sha256=None,
            )
            for number, (name, adapter) in enumerate(adapters.items(), 1)
        ]
        return replace(self, adapters=tuple(beside))

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The result of `function`, called on one of `threads`."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    def close(self) -> None:
        """End the threads and the process of the templates."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.templates.close()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, if it has one."""
        return None if self.tokenizer.chat_template is None else ChatTemplate(self.tokenizer, self.templates)

    def of_model(self, name: str | None) -> Service:
        """The model of that name: this one, which it is for None, or one of the adapters.

        Raises:
            ApiError: 404.
        """
        for model in (self, *self.adapters):
            if name in (None, model.name):
                return model
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

    async def token_texts(self, ids: list[int]) -> list[str]:
        """`token_text` of each."""
        if len(ids) <= _LONG_TEXT:
            return [self.token_text(token) for token in ids]
        return await self.in_thread(lambda: [self.token_text(token) for token in ids])

    async def detokenize(self, ids: list[int]) -> str:
        """The text of ids."""
        decode = self.tokenizer.decode
        return decode(ids) if len(ids) <= _LONG_TEXT else await self.in_thread(decode, ids)

    async def encode(self, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[list[int]]:
        """Ids of each prompt, at least one each, all within the vocabulary.

        Raises:
            ApiError: 400.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        self.check_length(max(map(len, texts), default=0), param)
        if sum(map(len, prompts)) > _LONG_TEXT:
            return await self.in_thread(self._encode_all, prompts, param)
        return self._encode_all(prompts, param)

    def check_length(self, characters: int, param: str) -> None:
        """Refuse a text that cannot fit into the context, however it is tokenised, before it is."""
        least = -(-characters // self.tokenizer.longest_token)
        if least > self.config.block_size and self.tokenizer.normalization is None:
            raise bad_request(
                f"the prompt's {characters} characters are at least {least} tokens and exceed this model's context of "
                f"{self.config.block_size}: shorten it",
                param,
                "context_length_exceeded",
            )

    def _encode_all(self, prompts: Sequence[str | list[int]], param: str) -> list[list[int]]:
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
        return encode(text) if len(text) <= _LONG_TEXT else await self.in_thread(encode, text)

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
            "sample_prompts": list(self.sample_prompts),
            "training_text": self.training_text is not None,
            **({} if self.frozen_sha256 is None else {"frozen_sha256": self.frozen_sha256}),
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

    >>> model_name("runs/version_3/last.ckpt"), model_name("openai-community/gpt2"), model_name("frozen:poet")
    ('last', 'gpt2', 'poet')
    """
    last = source.removeprefix("frozen:").rstrip("/").rsplit("/", 1)[-1].removesuffix(".ckpt")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "lit_gpt"
