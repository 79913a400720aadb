"""The continuations of `predict`: the model in its fastest form, with its draft and its adapters, and the prompts."""

from __future__ import annotations

import torch

from lit_gpt.data.prompts import PromptRecord
from lit_gpt.generation.complete import Completion, Completions, encode_prompt
from lit_gpt.generation.engine import Draft, Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.inference.prepare import prepare_adapters, prepare_for_inference
from lit_gpt.model.gpt import GPT
from lit_gpt.model.lora import NamedAdapters
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.adapter import merge

Finished = list[tuple[PromptRecord, list[Completion]]]
"""Prompts, each with all of its continuations."""


def prediction_engine(
    model: GPT,
    tokenizer: Tokenizer | None,
    precision: str,
    device: torch.device,
    draft: Draft | None = None,
    adapters: NamedAdapters | None = None,
) -> Engine:
    """An engine over `model`, which is turned into its inference form in place.

    Args:
        model: on its device.
        tokenizer: of it and its adapters.
        precision: of its weights, as for `prepare_for_inference`.
        device: where it is.
        draft: what proposes tokens in speculative decoding, where it is a checkpoint.
        adapters: over the model.
    """
    merge(model)  # the terms of an adapter that was loaded alone
    prepare_for_inference(model, precision)
    if draft is not None:
        prepare_for_inference(draft.model.to(device), precision)
    bank = None if adapters is None else prepare_adapters(model, adapters)
    return Engine(model, model.config, tokenizer, draft=draft, device=device, adapters=bank)


class Predictions:
    """Prompts that are being continued, a batch after the other."""

    def __init__(
        self, engine: Engine, generation_config: GenerationConfig, adapters: NamedAdapters | None = None
    ) -> None:
        """On `engine`, by these settings; prompts that name none of the `adapters` get the first."""
        self._completions: Completions[PromptRecord] = Completions(engine, generation_config)
        self._tokenizer, self._adapters = engine.tokenizer, adapters

    def step(self, batch: list[PromptRecord], is_last: bool) -> Finished:
        """Continue prompts; those that are finished by now, which may be of earlier batches.

        A batch fills the engine's free slots and returns when it would have to wait, the last one when all is done.
        """
        completions, finished = self._completions, []
        for prompt in batch:
            while not completions.has_capacity:
                finished += completions.step()
            ids = encode_prompt(self._tokenizer, prompt.prompt, prompt.ids)
            adapters = self._adapters
            completions.add(prompt, ids, 0 if adapters is None else max(1, adapters.number(prompt.model)))
        while is_last and completions.busy:
            finished += completions.step()
        return finished
