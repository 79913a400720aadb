"""An open checkpoint of any kind, whose weights have not been read yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lit_gpt.checkpoint.format import build_model
from lit_gpt.checkpoint.training_record import TrainingRecord
from lit_gpt.console.messages import note
from lit_gpt.convert.weights import DTYPES, StoredTensor, TensorEntry
from lit_gpt.errors import UserError, nearest
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint whose weights have not been read yet.

    Attributes:
        name: what the user called it.
        kind: whose format it is.
        config: the model's shape.
        tokenizer: its tokenizer, or None where the source has none.
        weights: by the names of `GPT.state_dict`; a tied head is not among them.
        plan: where each of these is in the source, by its own names.
        training: what the checkpoint says of the run that made it; None where it is none of ours.
        is_adapter: whether it is an adapter, merged with its base.
    """

    name: str
    kind: str
    config: GPTConfig
    tokenizer: Tokenizer | None
    weights: dict[str, StoredTensor]
    plan: list[TensorEntry]
    training: TrainingRecord | None = None
    is_adapter: bool = False

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights, the same for all formats and dtypes that hold the same numbers; they are read.

        Tensors count by our names, in fp32 where they have fewer bits, and without the rows that pad a vocabulary.
        """
        total = hashlib.sha256()
        for name, stored in sorted(without_padding(self).items()):
            tensor = stored.read()
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def to(self, dtype: str | torch.dtype | None) -> SourceCheckpoint:
        """The same with all weights in `dtype`; None keeps each as it is.

        Raises:
            UserError: for an unknown dtype.
        """
        if dtype is None:
            return self
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UserError(f'unknown dtype "{dtype}": {nearest(dtype, DTYPES)}')
            dtype = DTYPES[dtype]
        return replace(self, weights={name: stored.to(dtype) for name, stored in self.weights.items()})

    def load(self) -> GPT:
        """The model in memory, on the CPU and in eval mode. The source may change afterwards."""
        weights = {name: stored.read() for name, stored in self.weights.items()}
        return build_model(self.config, weights, self.name)


def without_padding(source: SourceCheckpoint) -> dict[str, StoredTensor]:
    """Rows past the vocabulary cut off: their logits never leave our model, transformers would sample from them."""
    size = source.config.vocab_size
    padded = {"wte.weight", "lm_head.weight", "lm_head.bias"}
    return {n: s.rows(0, size) if n in padded else s for n, s in source.weights.items()}


def named_tokenizer(name: str, vocab_size: int) -> Tokenizer | None:
    """tiktoken's `name` without the tokens past `vocab_size`; None, with a note, where it cannot be had."""
    try:
        whole = get_tokenizer(name)
    except UserError as error:
        note(f"without a tokenizer: {error}")
        return None
    if whole.n_vocab <= vocab_size:
        return whole
    ranks = {token: rank for token, rank in whole.ranks.items() if rank < vocab_size}
    specials = {text: number for text, number in whole.specials.items() if number < vocab_size}
    end = whole.end_of_text if whole.end_of_text in specials else None
    return Tokenizer.build(f"{name}:{vocab_size}", whole.pattern, ranks, specials, end_of_text=end)
