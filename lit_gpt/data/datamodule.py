"""TokenDataModule: from a folder or address of token shards to batches, resumable to the exact sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn

from lit_gpt.console.messages import note
from lit_gpt.data.conversation_rows import ConversationRows
from lit_gpt.data.document_rows import DocumentRows
from lit_gpt.data.folder_tokenizer import check_same_kind, folder_tokenizer
from lit_gpt.data.formats import DataFormat
from lit_gpt.data.index import TEXT, ShardIndex
from lit_gpt.data.loader import Cursor, EvalLoader, RankShare, TrainLoader, share_of_rank
from lit_gpt.data.masks import MASK_DTYPE, mask_index
from lit_gpt.data.mixture_loader import MixedFolder, MixtureOrder, MixtureTrainLoader, mixture_fingerprint
from lit_gpt.data.option_checks import check_divisible, check_options, checked_mixture
from lit_gpt.data.pair_rows import PairRows
from lit_gpt.data.prepare_inputs import check_same_sources
from lit_gpt.data.remote import RemoteFolder, is_remote
from lit_gpt.data.resume import check_same_order
from lit_gpt.data.row_loader import RowEvalLoader, RowTrainLoader, shuffle_rows
from lit_gpt.data.shard_folder import is_prepared, load_index, open_local_split
from lit_gpt.data.shuffle import Shuffle
from lit_gpt.data.token_stream import TokenStream, open_split
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

REMOTE_WINDOW = 1 << 25  # tokens: shuffled at least so far when shards are fetched


class TokenDataModule(L.LightningDataModule):
    """Streams token shards.

    An optimizer step takes the next `batch_size` × `accumulate_grad_batches` samples of the order, however many ranks
    divide them among themselves. The cursor in the checkpoint counts samples, so a run resumed on another number of
    ranks goes on with the very next one.

    Attributes:
        tokenizer: of the shards, after `load_tokenizer`; None where none is known.
        block_size: T; set it before `setup`.
    """

    tokenizer: Tokenizer | None = None
    _remote: RemoteFolder | None = None
    _index: ShardIndex | None = None
    _shuffle: Shuffle | None = None
    _label = ""  # before the split in a line about it

    def __init__(
        self,
        path: str | None = None,
        source: str | None = None,
        tokenizer: str | None = None,
        val_split: str = "auto",
        batch_size: int = 12,
        block_size: int = 1024,
        seed: int = 1337,
        shuffle_tokens: int | None = None,
        cache_dir: str | None = None,
        cache_gb: float = 50.0,
        format: DataFormat = "text",
        attend_across: bool = False,
        rows: Literal["stream", "documents"] = "stream",
        mixture: dict[str, float] | None = None,
    ) -> None:
        """Where the tokens are and how they are cut.

        Args:
            path: folder of token shards, made from `source` if it has none; or the address of one: `https://…`,
                `s3://…`, `gs://…`, `hf://…`.
            source: what to prepare: a file, folder, glob or address of text, or `stdlib`.
            tokenizer: for `source`: `gpt2` (the default), `cl100k_base`, `char`, `byte`, `bpe:4096`, or a saved one's
                path. For shards that do not say: the one that they were made with.
            val_split: for `source`: `auto`, `hash:0.01` or `tail:0.1`.
            batch_size: rows of one forward pass, over all ranks together: each rank gets its share of them. An
                optimizer step takes `batch_size` × `accumulate_grad_batches` rows, on any number of ranks.
            block_size: tokens of a row; the program takes the model's.
            seed: of the shuffle.
            shuffle_tokens: shuffle within windows of so many consecutive tokens, so that few shards are needed at a
                time. Everything is shuffled together by default, or for an address windows of its largest shard's
                size, and at least 32 M tokens.
            cache_dir: where shards of an address are kept; `~/.cache/lit_gpt` by default.
            cache_gb: the least recently used of them are removed above so many GB.
            format: `text`; or `chat`: conversations, of which whole ones fill a row and only what the assistant says
                is learnt. `source` is then JSON lines of OpenAI's, ShareGPT's or Alpaca's form, or `stdlib-chat`. Or
                `pairs` of answers, of which one is preferred, in TRL's forms, or `stdlib-pairs`; a row is 2 T tokens.
            attend_across: of conversations, and of rows of documents: let each see those before it in its row, as text
                does. By default attention stays inside each, and positions begin at 0 in each.
            rows: of text in training: `stream`, windows that begin anywhere, or `documents`, which begin with one.
            mixture: folder → weight: train on samples of these folders, in these proportions after any number of
                samples, in place of `path`, whose tokenizer and validation data are used.
        """
        super().__init__()
        self.save_hyperparameters()
        self.path, self.source, self.spec, self.val_split = path, source, tokenizer, val_split
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.shuffle_tokens, self.cache_dir, self.cache_gb = shuffle_tokens, cache_dir, cache_gb
        self.format, self.attend_across, self.rows = format, attend_across, rows
        self._streams: dict[str, TokenStream] = {}
        self._rows: dict[str, ConversationRows | DocumentRows] = {}
        self._folders: list[MixedFolder] = []  # of the mixture, once they are opened
        self._cursor = Cursor()
        check_options(self)
        self._mixture = checked_mixture(self, mixture)

    @property
    def _has_rows(self) -> bool:
        """Whether training samples are packed rows, and not windows of the stream."""
        return self.format != TEXT or self.rows == "documents"

    # Preparing ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the shards if there are none."""
        path = self._address
        if is_remote(path):
            return
        if is_prepared(path):
            if self.source is not None and self.format != TEXT:
                check_same_sources(path, self.source, self.format)
            return
        if self.source is None:
            if Path(path).is_dir():
                load_index(path)  # an unfinished preparation has its own message
            raise UserError(f"{path} has no token shards: give --data.source TEXT to make them, or another --data.path")
        from lit_gpt.data.prepare import prepare

        prepare(self.source, path, self.spec or "gpt2", val_split=self.val_split, data_format=self.format)

    def load_tokenizer(self, fallback: Tokenizer | None = None) -> None:
        """Find the shards' tokenizer: beside them, or the one named for shards that do not say.

        Args:
            fallback: for shards that do not say, where none is named: the model's own.

        Raises:
            UserError: shards and tokenizer do not belong together.
        """
        index = self._load_index()
        self.tokenizer = folder_tokenizer(self._address, index, self._tokenizer_file(), self.spec, fallback)

    def _tokenizer_file(self) -> Path | None:
        if self._remote is not None:
            return self._remote.fetch_optional(TOKENIZER_FILE)
        path = Path(self._address) / TOKENIZER_FILE
        return path if path.is_file() else None

    def check_training(self) -> None:
        """Refuse, before anything is computed, what cannot be trained on: folders of a mixture, rows of documents.

        Raises:
            UserError: naming it.
        """
        for name in self._mixture.names if self._mixture is not None else ():
            self._folder(name)
        if self.rows == "documents":
            self._end_of_text()

    @property
    def _address(self) -> str:
        if self.path is None:
            raise UserError("no data: give --data.path FOLDER, and --data.source TEXT if it has no shards yet")
        return self.path

    # Opening -----------------------------------------------------------------------------------------------------

    def _load_index(self) -> ShardIndex:
        if self._index is None and is_remote(self._address):
            self._remote = RemoteFolder(self._address, self.cache_dir, self.cache_gb)
            self._index = self._remote.load_index()
        elif self._index is None:
            self._index = load_index(self._address)
        if self._index.format != self.format:
            raise UserError(
                f"{self.path} holds shards of format {self._index.format}, not {self.format}: name the folder of other "
                f"shards, or give --data.format {self._index.format}"
            )
        return self._index

    def _open_stream(self, split: str) -> TokenStream:
        """The tokens of a split.

        Raises:
            UserError: there are none, or too few for one block.
        """
        if split not in self._streams:
            self._streams[split] = self._open(self._load_index(), split)
        if self.format == TEXT and len(self._streams[split]) <= self.block_size:
            raise UserError(
                f"{self._address}: the {split} split has {len(self._streams[split])} tokens, fewer than one block of "
                f"{self.block_size} + 1: take a smaller block_size or more text"
            )
        return self._streams[split]

    def _open(self, index: ShardIndex, split: str) -> TokenStream:
        """A split of the folder's shards, or of their masks."""
        where, remote = self._address, self._remote
        if remote is not None:
            return open_split(index, split, where, remote.locate, local=False)
        if index.dtype == MASK_DTYPE:
            return open_split(index, split, where, lambda shard: Path(where) / shard.name, local=True)
        return open_local_split(index, split, where)

    def _open_rows(self, split: str) -> ConversationRows | DocumentRows:
        """The conversations or documents of a split in rows.

        Raises:
            UserError: there are none, or their masks are damaged.
        """
        if split not in self._rows:
            rows = self._make_rows(split)
            if self.trainer is None or self.trainer.is_global_zero:
                note(f"{self._label}{split}: {rows.report}")
            self._rows[split] = rows
        return self._rows[split]

    def _make_rows(self, split: str) -> ConversationRows | DocumentRows:
        tokens = self._open_stream(split)
        if self.format == TEXT:
            options = self.block_size, self.seed, self._n_vocab, self.attend_across
            return DocumentRows(tokens, self._end_of_text(), *options)
        marks = self._open(mask_index(self._load_index()), split)
        of_masked = tokens, marks, self.block_size, self.seed, self._n_vocab
        return PairRows(*of_masked) if self.format == "pairs" else ConversationRows(*of_masked, self.attend_across)

    def _end_of_text(self) -> int:
        """The id between documents. Raises UserError if there is none."""
        index, tokenizer = self._load_index(), self.tokenizer
        found = tokenizer.eot_id if index.eot_id is None and tokenizer is not None else index.eot_id
        if found is None:
            raise UserError(f"{self.path}: no end-of-text stands between its documents: leave data.rows out")
        return found

    @property
    def pairs(self) -> dict[str, PairRows]:
        """The pairs of each split that the stage reads, after `setup`."""
        return {split: rows for split, rows in self._rows.items() if isinstance(rows, PairRows)}

    def _folder(self, name: str) -> TokenDataModule:
        """A folder of the mixture, whose samples are cut and shuffled as this one's are. Raises UserError."""
        options = {"rows": self.rows, "format": self.format, "attend_across": self.attend_across}
        folder = TokenDataModule(name, block_size=self.block_size, seed=self.seed, **options)  # type: ignore[arg-type]
        folder.shuffle_tokens, folder.tokenizer, folder.trainer = self.shuffle_tokens, self.tokenizer, self.trainer
        folder._label = f"{name}, "
        check_same_kind(name, folder._load_index(), self._address, self._load_index())
        return folder

    def setup(self, stage: str) -> None:
        """Open what the stage reads. A fit starts at the first sample, unless a checkpoint says otherwise."""
        if stage == "predict":
            return
        if self.tokenizer is None:
            self.load_tokenizer()
        if stage == "fit":
            self._shuffle = self._make_shuffle()
            self._cursor.reset()
            samples, step = self._shuffle.epoch_samples, self._share(True).step
            if samples < step:
                where = self.path if self._mixture is None else "data.mixture"
                raise UserError(
                    f"{where}: the train split has {samples} samples of {self.block_size} tokens, fewer than an "
                    f"optimizer step's {step}: take a smaller batch_size or more text"
                )
        if stage != "fit" or self.trainer is None or self.trainer.limit_val_batches != 0:
            split = self._eval_split(stage)
            self._open_stream(split) if self.format == TEXT else self._open_rows(split)

    def _make_shuffle(self) -> Shuffle:
        """The order of the training samples, which are opened."""
        if self._mixture is not None:
            self._folders = [self._folder(name)._samples() for name in self._mixture.names]
            return MixtureOrder(self._mixture, [folder.order for folder in self._folders])
        if self._has_rows:
            return shuffle_rows(self._open_rows("train"), self.seed)
        train = self._open_stream("train")
        return Shuffle(len(train), self.block_size, self.seed, self._window_tokens(train))

    def _samples(self) -> MixedFolder:
        """This folder's training samples as a part of a mixture."""
        order = self._make_shuffle()
        return MixedFolder(self._train_loader(order, RankShare(1)), order, self._fingerprint)

    def _eval_split(self, stage: str) -> str:
        """Few folders have a test split; where there is none, validation data serves."""
        return "test" if stage == "test" and self._load_index().split("test") else "val"

    def _window_tokens(self, stream: TokenStream) -> int | None:
        if self.shuffle_tokens is not None or self._remote is None:
            return self.shuffle_tokens
        return max(REMOTE_WINDOW, max(shard.tokens for shard in stream.shards))

    def _share(self, train: bool) -> RankShare:
        """This rank's part of a batch.

        Raises:
            UserError: a training batch can't be divided evenly.
        """
        trainer = self.trainer
        if trainer is None or not train:
            return share_of_rank(trainer, self.batch_size)
        check_divisible(self.batch_size, trainer.world_size)
        return share_of_rank(trainer, self.batch_size, trainer.accumulate_grad_batches)

    # Loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        """Shuffled samples, from the cursor on."""
        assert self._shuffle is not None, "setup('fit') comes first"
        if isinstance(self._shuffle, MixtureOrder):
            return MixtureTrainLoader(self._folders, self._shuffle, self._cursor, self._share(True))
        return self._train_loader(self._shuffle, self._share(True))

    def _train_loader(self, order: Shuffle, share: RankShare) -> TrainLoader:
        if self._has_rows:
            return RowTrainLoader(self._open_rows("train"), order, self._cursor, share)
        return TrainLoader(self._open_stream("train"), order, self._cursor, share, self._n_vocab, self._prefetch)

    def val_dataloader(self) -> EvalLoader:
        """All windows of the validation split, or all its rows of conversations, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> EvalLoader:
        """The same of the test split, or else of the validation split."""
        return self._eval_dataloader(self._eval_split("test"))

    def _eval_dataloader(self, split: str) -> EvalLoader:
        share = self._share(False)
        if self.format != TEXT:
            return RowEvalLoader(self._open_rows(split), share)
        return EvalLoader(self._open_stream(split), self.block_size, share, self._n_vocab)

    def example_prompts(self, count: int) -> list[list[int]]:
        """The first conversations of the validation split up to the assistant's first turn, as ids; none of text."""
        rows = None if self.format == TEXT else self._open_rows("val")
        return [ids.tolist() for ids in rows.prompts(count)] if isinstance(rows, ConversationRows) else []

    @property
    def _n_vocab(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.n_vocab

    def _prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Fetch shards before they are needed."""
        if self._remote is not None:
            stream = self._streams["train"]
            numbers = [number for start, count in spans for number in stream.shard_range(start, count)]
            self._remote.prefetch([stream.shards[number] for number in dict.fromkeys(numbers)])

    # Resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and the data and order in which it is a position."""
        if self._shuffle is None:
            return {}
        epoch, position = self._cursor.epoch, self._cursor.position
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            if progress.processed < progress.ready:  # stopped after the batch was fetched, before it was trained on
                epoch, position = self._cursor.before
        accumulate = self._share(True).accumulate
        return {"epoch": epoch, "position": position, "accumulate": accumulate, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        assert self._shuffle is not None
        versions = None if self._remote is None else self._remote.versions
        return {
            "rows": self.rows,
            "mixture": None if self._mixture is None else self._mixture.ratio,
            "fingerprint": self._fingerprint,
            "block_size": self.block_size,
            "seed": self.seed,
            "window": self._shuffle.window,
            **({} if versions is None else {"versions": versions}),
        }

    @property
    def _fingerprint(self) -> str:
        """A hash of the training tokens, and of the mixture if they are one."""
        if self._mixture is not None:
            return mixture_fingerprint(self._mixture, self._folders)
        return (self._rows if self._has_rows else self._streams)["train"].fingerprint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's cursor.

        Raises:
            UserError: it is a position in other data, or in another order.
        """
        if self._shuffle is None or (self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING):
            return
        check_same_order(self.path, state_dict, self._identity())
        self._cursor.reset(state_dict["epoch"], state_dict["position"])
