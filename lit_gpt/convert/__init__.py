"""Checkpoints of other projects, in and out. Imports no torch by itself: `--help` stays fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lit_gpt.convert.source import Source
    from lit_gpt.model import GPT
    from lit_gpt.tokenizer import Tokenizer


def open_source(source: str, tokenizer: str | None = None, n_head: int | None = None) -> Source:
    """Recognise a checkpoint of any kind and read everything but its weights.

    Args:
        source: a Hugging Face folder or id, nanoGPT's `ckpt.pt`, a `.pth` of "LLMs from scratch", the transformer
            book's `model.ckpt`, or a checkpoint of ours. An id that is not in the cache is downloaded.
        tokenizer: to use instead of the source's: what `get_tokenizer` takes, or the path of nanoGPT's `meta.pkl`.
        n_head: number of heads, where the source does not say.

    Returns:
        An object with `config`, `tokenizer` (None where there is none), `weights` (read when asked) and `load()`.

    Raises:
        UserError: if it is none of these, cannot be had, is damaged, wants to run code, or describes a model that this
            project does not express (naming the field).
    """
    from lit_gpt.convert.recognise import open_source

    return open_source(source, tokenizer, n_head)


def load_source(source: str, dtype: str | torch.dtype | None = None) -> tuple[GPT, Tokenizer | None]:
    """The model (on the CPU, in eval mode) and tokenizer of a checkpoint of any kind; what `--init_from` takes.

    Args:
        source: as for `open_source`.
        dtype: of the weights; None keeps the source's.

    Raises:
        UserError: as `open_source`, or for an unknown dtype.
    """
    opened = open_source(source).to(dtype)
    return opened.load(), opened.tokenizer


def main(argv: list[str]) -> int:
    """The program `lit_gpt convert`."""
    from lit_gpt.convert.command import main

    return main(argv)
