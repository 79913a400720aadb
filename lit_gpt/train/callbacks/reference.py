"""The reference model of preference tuning: its log-probabilities of all answers, computed once, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_gpt.batch import PairBatch
from lit_gpt.console.messages import note
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.loader import RankShare
from lit_gpt.data.row_loader import RowEvalLoader
from lit_gpt.errors import UserError
from lit_gpt.train.dpo import answer_logprobs
from lit_gpt.train.module import LitGPT


class ReferenceLogprobs(Callback):
    """Gives the data the log-probability of each answer under the model as it was at the start of the run.

    They are in the run's checkpoints, with the hashes of the weights and of the data that they belong to: a resumed run
    has them from there, since it has those weights no more.

    Attributes:
        weights: sha256 of the reference model's weights; "" before it is known.
    """

    def __init__(self, data: TokenDataModule) -> None:
        self._data = data
        self.weights = ""

    # At the start ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute them, unless the checkpoint that the run goes on from has them."""
        if trainer.ckpt_path is None:
            self._compute(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a run that had no reference. Raises UserError."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise UserError(
                f"{trainer.ckpt_path} has no log-probabilities of a reference model: its run was not one of pairs; "
                "start a new one from it with --init_from"
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Outside of a `fit`, compute them, unless they are in the checkpoint that is judged."""
        if not self.weights:
            self._compute(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute them, unless they are in the checkpoint that is judged."""
        if not self.weights:
            self._compute(trainer, pl_module)

    # The work ----------------------------------------------------------------------------------------------------

    def _compute(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The table of each split that is read. All ranks take part, each in its share of the rows."""
        assert isinstance(module, LitGPT)
        self.weights = weights_hash(module)
        was_training = module.training
        module.eval()
        size, ranks = max(1, self._data.batch_size // trainer.world_size), trainer.world_size
        for split, rows in self._data.pairs.items():
            loader = RowEvalLoader(rows, RankShare(size, ranks, trainer.global_rank))
            table = torch.zeros(rows.reference.shape, device=module.device)
            with _progress(trainer, f"reference model, {split} pairs", len(loader)) as advance:
                for batch in loader:
                    batch = module.transfer_batch_to_device(batch, module.device, 0)
                    assert isinstance(batch, PairBatch)
                    with torch.no_grad(), trainer.precision_plugin.forward_context():
                        logprobs = answer_logprobs(module.model, batch)
                    present = batch.numbers >= 0
                    table[batch.numbers[present]] = logprobs[present].float()
                    advance()
            table = trainer.strategy.reduce(table, reduce_op="sum")
            rows.reference[:] = table.cpu().numpy()
        module.train(was_training)

    # Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The tables, and the hashes of weights and data that they belong to."""
        if not self.weights:
            return {}
        tables = {split: torch.from_numpy(rows.reference) for split, rows in self._data.pairs.items()}
        data = {split: rows.fingerprint for split, rows in self._data.pairs.items()}
        return {"weights": self.weights, "data": data, "logprobs": tables}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The tables of a checkpoint, for the same data.

        Raises:
            UserError: there are none of a split that is read, or they belong to other data.
        """
        self.weights = state_dict.get("weights", "")
        for split, rows in self._data.pairs.items() if self.weights else ():
            if state_dict["data"].get(split) != rows.fingerprint:
                raise UserError(
                    f"{self._data.path}: its {split} pairs are not those of the checkpoint's run, whose reference "
                    "log-probabilities belong to them: name the run's data, or start a new run with --init_from"
                )
            rows.reference[:] = state_dict["logprobs"][split].numpy()


def weights_hash(module: LitGPT) -> str:
    """sha256 of all weights, by name; every rank takes part, since sharded ones are gathered."""
    digest = hashlib.sha256()
    for name, tensor in module.model.state_dict().items():
        whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}\n".encode())
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _progress(trainer: L.Trainer, what: str, steps: int) -> Iterator[Any]:
    """A bar on stderr, on rank 0; one line where bars are off. Gives the function that advances it."""
    if not trainer.is_global_zero or trainer.progress_bar_callback is None:
        if trainer.is_global_zero:
            note(f"{what}: {steps} batches")
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda: bar.advance(task)
