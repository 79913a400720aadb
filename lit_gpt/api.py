"""The Python API: `load` a checkpoint of any kind, then generate, stream and score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from lit_gpt.checkpoint.format import resolve_ckpt_path
from lit_gpt.convert.adapter_set import AdapterSet, open_adapters
from lit_gpt.convert.recognise import CONVERTED, open_source
from lit_gpt.errors import UserError
from lit_gpt.generation.complete import Completion, PromptInput, complete, encode_prompt, stream_outputs, texts_of
from lit_gpt.generation.engine import Draft, Engine
from lit_gpt.generation.generation import Value
from lit_gpt.generation.generation_config import NGRAM, GenerationConfig
from lit_gpt.generation.outputs import Token
from lit_gpt.inference.prepare import prepare_adapters, prepare_for_inference
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer


def load(
    path_or_id: str,
    precision: str = "auto",
    device: str = "auto",
    n_head: int | None = None,
    adapters: Mapping[str, str] | None = None,
) -> Generator:
    """Load a checkpoint for generation.

    Args:
        path_or_id: whatever `--ckpt_path` and `--init_from` take: a checkpoint of ours, `last`, `best`, a folder or id
            of Hugging Face, nanoGPT's `ckpt.pt` or its folder, …
        precision: `auto` (what is fastest here without a loss to speak of), `fp32`, `bf16`, `int8` or `int4`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        n_head: number of heads, which a `.pth` of "LLMs from scratch" lacks.
        adapters: name → checkpoint or folder of adapters over it, for `generate(..., adapter=NAME)`.

    Raises:
        UserError: if there is no such checkpoint, precision or device, or the checkpoint has other heads, or an adapter
            is of another base.
    """
    return load_for(path_or_id, precision, device, n_head, "load(..., n_head=N)", adapters)


def load_for(
    path_or_id: str,
    precision: str,
    device: str,
    n_head: int | None,
    n_head_option: str,
    adapters: Mapping[str, str] | None = None,
) -> Generator:
    """`load` on behalf of a command, whose user gives `n_head` by `n_head_option`: errors name that."""
    path = str(resolve_ckpt_path(path_or_id)) if path_or_id in ("last", "best") else path_or_id
    source = open_source(path, None, n_head, n_head_option)
    opened = open_adapters(adapters, source) if adapters else None
    target = resolve_device(device)
    model = prepare_for_inference(source.load().to(target), precision)
    prompts = () if source.training is None else source.training.sample_prompts
    return Generator(model, source.tokenizer, precision, target, opened, prompts)


def resolve_device(device: str) -> torch.device:
    """The device of that name, `auto` being the fastest there is.

    Raises:
        UserError: if it is unknown or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={device!r} cannot be used here: choose auto or cpu") from error
    return found


class Generator:
    """A model and its tokenizer, ready to generate. Keyword names are the flags of `predict` (`GenerationConfig`).

    Attributes:
        model: the GPT, in eval mode.
        tokenizer: None for a model of bare ids.
        config: its shape.
        device: where it is.
        adapters: over it, if there are any.
        sample_prompts: texts to begin with that suit it, where its checkpoint has kept some.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None,
        precision: str = "auto",
        device: torch.device | str = "cpu",
        adapters: AdapterSet | None = None,
        sample_prompts: tuple[str, ...] = (),
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.sample_prompts = sample_prompts
        self._options: dict[str, Any] = {}
        if adapters is not None:
            self.tokenizer = adapters.tokenizer
            self._options["adapters"] = prepare_adapters(model, adapters.named)
        self.device = torch.device(device)
        self._precision = precision
        self._engines: dict[str, Engine] = {}

    @property
    def config(self) -> GPTConfig:
        """The model's shape."""
        return self.model.config

    def engine(self, draft: str = NGRAM, **options: Any) -> Engine:
        """A new engine over the model. `draft` is a checkpoint for `speculative`, `options` are `Engine`'s own.

        Raises:
            UserError: for a draft that does not fit.
        """
        if draft != NGRAM:
            small = load_for(draft, self._precision, str(self.device), None, CONVERTED)
            options["draft"] = Draft(small.model, small.config, small.tokenizer)
        return Engine(self.model, self.config, self.tokenizer, device=self.device, **self._options, **options)

    def complete(
        self, prompts: Sequence[PromptInput], value: Value | None = None, adapter: str | None = None, **settings: Any
    ) -> list[list[Completion]]:
        """All continuations of all prompts, with everything that is known about them; the arguments are `generate`'s.

        Raises:
            UserError: for settings or prompts that are wrong, or an adapter that is not there.
            RuntimeError: if the model's logits are no numbers.
        """
        generation_config = GenerationConfig.from_dict(settings)
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        results: list[list[Completion]] = [[] for _ in prompts]
        number = self._adapter(adapter)
        engine = self._engine(generation_config)
        try:
            for index, completions in complete(engine, ids, generation_config, value, number):
                results[index] = completions
        finally:
            engine.cancel_all()  # after an error or an interrupt: what is left must not meet the next call
        for completion in (completion for completions in results for completion in completions):
            if completion.error is not None:
                raise RuntimeError(completion.error)
        return results

    def _adapter(self, name: str | None) -> int:
        """The number of an adapter; 0 for the model itself."""
        if name is not None and self.adapters is None:
            raise UserError(f'adapter="{name[:80]}": none was loaded; give load(..., adapters={{NAME: PATH}})')
        return 0 if self.adapters is None else self.adapters.named.number(name)

    def generate(
        self,
        prompt: PromptInput | Sequence[PromptInput],
        value: Value | None = None,
        adapter: str | None = None,
        **settings: Any,
    ) -> Any:
        """Continue a prompt, or several.

        >>> gpt.generate("ROMEO:", max_new_tokens=50, temperature=0.8)  # doctest: +SKIP

        Args:
            prompt: text, a list of ids, or a list of such.
            value: rates texts (ids, prompt included) for `strategy="mcts"`.
            adapter: the name of one that was loaded; None for the model itself.
            settings: of `GenerationConfig`.

        Returns:
            The continuation as text (as ids where there is no tokenizer); a list of them for a list of prompts. With
            `num_samples` above 1 each of them is a list. The type depends on these values, so it is not declared.

        Raises:
            UserError: for settings or prompts that are wrong.
        """
        one = isinstance(prompt, str) or (len(prompt) > 0 and all(isinstance(token, int) for token in prompt))
        prompts = cast("Sequence[PromptInput]", [prompt] if one else prompt)
        results = self.complete(prompts, value, adapter, **settings)
        single = settings.get("num_samples", 1) == 1
        made = [[self._plain(item) for item in completions] for completions in results]
        flat = [items[0] if single else items for items in made]
        return flat[0] if one else flat

    def stream(self, prompt: PromptInput, **settings: Any) -> Iterator[str]:
        """Yield the continuation piece by piece, in whole characters. Leaving the loop ends it.

        Raises:
            UserError: for settings or a prompt that are wrong, or where there is no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("this model came without a tokenizer, so there is no text to stream: use generate")
        generation_config = GenerationConfig.from_dict(settings)
        if generation_config.num_samples > 1:
            raise UserError(f"num_samples={generation_config.num_samples} cannot be streamed as one text: use generate")
        ids = encode_prompt(self.tokenizer, prompt)
        return texts_of(stream_outputs(self._engine(generation_config), ids, generation_config))

    def logprobs(self, text: PromptInput, top: int = 0) -> list[Token]:
        """Score a text: each token's log-probability (natural) after those before it, and the `top` likeliest.

        The first token has none: nothing came before it.

        Raises:
            UserError: if `text` is empty or has ids outside the vocabulary.
        """
        ((completion,),) = self.complete([text], max_new_tokens=0, prompt_logprobs=top)
        return completion.prompt or []

    def _engine(self, generation_config: GenerationConfig) -> Engine:
        """The engine that `generate` and its like share: its slots keep cached prefixes from call to call.

        While a stream is being read, it is busy, and the call gets one of its own.
        """
        generation_config.check()
        draft = generation_config.draft_checkpoint or NGRAM
        if draft in self._engines and self._engines[draft].has_work:
            return self.engine(draft)
        if draft not in self._engines:
            self._engines[draft] = self.engine(draft)
        return self._engines[draft]

    def _plain(self, completion: Completion) -> str | list[int]:
        return completion.ids if self.tokenizer is None else completion.text
