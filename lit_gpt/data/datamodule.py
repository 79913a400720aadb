"""TokenDataModule: batches of token windows for training, validation and test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_gpt.data.prepare import prepare
from lit_gpt.data.shards import TokenStream, is_prepared, open_tokens
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer

Batch = tuple[Tensor, Tensor]


class TokenDataModule(L.LightningDataModule):
    """Streams token shards.

    Attributes:
        tokenizer: of the shards, after `load_tokenizer`; None where the folder has none.
    """

    def __init__(
        self,
        path: str | None = None,
        source: str | None = None,
        tokenizer: str = "gpt2",
        val_split: str = "auto",
        batch_size: int = 12,
        block_size: int = 1024,
        seed: int = 1337,
    ) -> None:
        """Where the tokens are and how they are cut.

        Args:
            path: folder of token shards; made from `source` if it has none.
            source: what to prepare: a file, folder, glob or address of text, or `stdlib`.
            tokenizer: for `source`: `gpt2`, `cl100k_base`, `char`, `byte`, `bpe:4096`, or a saved one's path.
            val_split: for `source`: `auto`, `hash:0.01` or `tail:0.1`.
            batch_size: rows of one batch.
            block_size: tokens of a row; the program takes the model's.
            seed: of the shuffle.
        """
        super().__init__()
        self.save_hyperparameters()
        self.path, self.source, self.spec, self.val_split = path, source, tokenizer, val_split
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.tokenizer: Tokenizer | None = None

    def prepare_data(self) -> None:
        """Make the shards if there are none."""
        if self.path is None:
            raise UserError("no data: give --data.path FOLDER, and --data.source TEXT if it has no shards yet")
        if not is_prepared(self.path):
            if self.source is None:
                raise UserError(f"{self.path} has no token shards: give --data.source TEXT to make them")
            prepare(self.source, self.path, self.spec, val_split=self.val_split)

    def load_tokenizer(self) -> None:
        """Read the folder's tokenizer, if it has one."""
        path = Path(self.path or "") / "tokenizer.json"
        self.tokenizer = Tokenizer.load(path) if path.is_file() else None

    def train_dataloader(self) -> DataLoader:
        """Shuffled windows."""
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader:
        """All windows of the validation split, in order."""
        return self._loader("val", False)

    def test_dataloader(self) -> DataLoader:
        """All windows of the test split, in order."""
        return self._loader("test", False)

    def _loader(self, split: str, shuffle: bool) -> DataLoader:
        if self.path is None:
            raise UserError("no data: give --data.path FOLDER")
        windows = _Windows(
            open_tokens(self.path, split), self.batch_size, self.block_size, self.seed if shuffle else None
        )
        return DataLoader(windows, batch_size=None)


class _Windows(IterableDataset):
    def __init__(self, stream: TokenStream, batch_size: int, block_size: int, seed: int | None) -> None:
        self.stream, self.batch_size, self.block_size, self.seed = stream, batch_size, block_size, seed
        self.count = (len(stream) - 1) // block_size

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(self.count)
        if self.seed is not None:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed))
        for chosen in order[: len(self) * self.batch_size].split(self.batch_size):
            rows = [self.stream.read(int(i) * self.block_size, self.block_size + 1).astype("int64") for i in chosen]
            window = torch.stack([torch.from_numpy(row) for row in rows])
            yield window[:, :-1], window[:, 1:]
