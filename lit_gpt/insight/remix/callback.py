"""`fit --remix true`: the share of new n-grams in samples, logged at every validation."""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from lit_gpt.errors import UserError
from lit_gpt.generation.complete import encode_prompt
from lit_gpt.insight.remix.main import open_corpus, remix
from lit_gpt.train.callbacks.samples import SamplePrompt, Samples
from lit_gpt.train.module import LitGPT

_ORDERS = (4, 8)  # n of the n-grams whose new share is logged


class RemixFigures(Callback):
    """Logs how much of some samples, and of as much held-out text, is new, and the longest verbatim run.

    The samples continue a line break. The whole training split is searched each time, in one pass.
    """

    def __init__(self, path: str | None, num_samples: int = 4, max_new_tokens: int = 128, seed: int = 1) -> None:
        """Figures of samples against the shards in the folder `path`.

        Args:
            path: of the training data.
            num_samples: how many texts to sample at each validation.
            max_new_tokens: the most tokens of each.
            seed: of the draws.
        """
        if path is None or "://" in path:
            raise UserError(f"remix searches the training tokens, which must be in a folder here, not {path}")
        self._path = path
        self._samples = Samples([], max_new_tokens, temperature=1.0, top_k=None, seed=seed)
        self._num_samples = num_samples

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample texts, search the training tokens for them and log the figures."""
        assert isinstance(pl_module, LitGPT)
        if trainer.sanity_checking or trainer.state.fn != "fit" or pl_module.tokenizer is None:
            return
        prompt = SamplePrompt("\n", encode_prompt(pl_module.tokenizer, "\n"))
        (texts,) = self._samples.generate(trainer, pl_module, [prompt], self._num_samples)
        if not trainer.is_global_zero:
            return
        ids = [np.asarray(pl_module.tokenizer.encode(text), np.int64) for text in texts]
        if not any(len(one) for one in ids):
            return  # end-of-text at once: early in training that happens
        report = remix(ids, open_corpus(self._path, pl_module.tokenizer))
        figures: dict[str, float | None] = {"remix/longest": report.samples.longest}
        for n in _ORDERS:
            figures[f"remix/new_{n}_grams"] = report.samples.novel[n]
            if report.held_out is not None:
                figures[f"remix/held_out_new_{n}_grams"] = report.held_out.novel[n]
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in figures.items() if v is not None}, step=trainer.global_step)
