"""TokenDataModule: from a folder or address of token shards to batches, resumable to the exact sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn

from lit_gpt.console import note
from lit_gpt.data.conversation_rows import (
    ConversationEvalLoader,
    ConversationRows,
    ConversationTrainLoader,
    shuffle_rows,
)
from lit_gpt.data.formats import DataFormat, check_template
from lit_gpt.data.index import TEXT, ShardIndex
from lit_gpt.data.loader import Cursor, EvalLoader, RankShare, TrainLoader
from lit_gpt.data.masks import MASK_DTYPE, mask_index
from lit_gpt.data.pair_rows import PairRows
from lit_gpt.data.prepare_inputs import check_same_sources
from lit_gpt.data.remote import RemoteFolder, is_remote
from lit_gpt.data.shard_folder import is_prepared, load_index, open_local_split
from lit_gpt.data.shuffle import Shuffle
from lit_gpt.data.token_stream import TokenStream, open_split
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, is_trained

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
            attend_across: of conversations: let each see those before it in its row, as text does. By default attention
                stays inside each, and positions begin at 0 in each.
        """
        super().__init__()
        self.save_hyperparameters()
        self.path, self.source, self.spec, self.val_split = path, source, tokenizer, val_split
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.shuffle_tokens, self.cache_dir, self.cache_gb = shuffle_tokens, cache_dir, cache_gb
        self.format, self.attend_across = format, attend_across
        self._streams: dict[str, TokenStream] = {}
        self._rows: dict[str, ConversationRows] = {}
        self._cursor = Cursor()
        self._check()

    def _check(self) -> None:
        for name in ("batch_size", "block_size", "shuffle_tokens", "cache_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"data.{name}={value} must be positive")
        if self.attend_across and self.format != "chat":
            raise UserError(f"data.attend_across is for conversations, not for {self.format}: leave it out")
        if self.shuffle_tokens is not None and self.format != TEXT:
            raise UserError("data.shuffle_tokens is for text, all conversations are shuffled together: leave it out")

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
        index, file = self._load_index(), self._tokenizer_file()
        if index.masked and file is None:
            raise UserError(f"{self.path}: its {TOKENIZER_FILE} is missing, which has the chat template: put it back")
        if file is not None:
            self.tokenizer = Tokenizer.load(file)
            if index.tokenizer_hash not in (None, self.tokenizer.hash):
                raise UserError(
                    f"{self.path}: its {TOKENIZER_FILE} is not the one that its shards were made with; prepare it again"
                )
            if index.masked:
                check_template(index, self.tokenizer, f"{self.path}: {TOKENIZER_FILE}")
            self._compare_spec(self.tokenizer)
        elif self.spec is None and not is_remote(self._address) and (Path(self._address) / "meta.pkl").exists():
            note(f"{self.path}: its vocabulary is in meta.pkl, which is not read since a pickle can run code")
        else:
            chosen = fallback if fallback and self.spec is None else get_tokenizer(self.spec or "gpt2")
            if index.tokenizer_hash not in (None, chosen.hash):
                raise UserError(
                    f"{self.path}: its {TOKENIZER_FILE} is missing, and its shards are of {index.tokenizer}, not of "
                    f"{chosen.name}: put it back, or name theirs with --data.tokenizer"
                )
            self.tokenizer = chosen

    def _compare_spec(self, found: Tokenizer) -> None:
        """Refuse shards of another tokenizer than the one asked for."""
        if self.spec in (None, found.name):
            return
        spec = str(self.spec)
        asked = None if is_trained(spec) else get_tokenizer(spec)
        if asked is not None and self.format != TEXT:
            asked = with_chat_template(asked)
        if asked is None or asked.hash != found.hash:
            raise UserError(
                f"{self.path} holds shards of the tokenizer {found.name}, not {self.spec}: leave --data.tokenizer out, "
                "or prepare the text in another folder"
            )

    def _tokenizer_file(self) -> Path | None:
        if self._remote is not None:
            return self._remote.fetch_optional(TOKENIZER_FILE)
        path = Path(self._address) / TOKENIZER_FILE
        return path if path.is_file() else None

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

    def _open_rows(self, split: str) -> ConversationRows:
        """The conversations of a split in rows.

        Raises:
            UserError: there are none, or their masks are damaged.
        """
        if split not in self._rows:
            tokens = self._open_stream(split)
            marks = self._open(mask_index(self._load_index()), split)
            options = tokens, marks, self.block_size, self.seed, self._n_vocab
            of_pairs = self.format == "pairs"
            rows = PairRows(*options) if of_pairs else ConversationRows(*options, self.attend_across)
            if self.trainer is None or self.trainer.is_global_zero:
                note(f"{split}: {rows.report}")
            self._rows[split] = rows
        return self._rows[split]

    @property
    def pairs(self) -> dict[str, PairRows]:
        """The pairs of each split that the stage reads, after `setup`."""
        return {split: rows for split, rows in self._rows.items() if isinstance(rows, PairRows)}

    def setup(self, stage: str) -> None:
        """Open what the stage reads. A fit starts at the first sample, unless a checkpoint says otherwise."""
        if stage == "predict":
            return
        if self.tokenizer is None:
            self.load_tokenizer()
        if stage == "fit":
            self._shuffle = self._make_shuffle()
            self._cursor.reset()
            if self._shuffle.samples < self._share(True).step:
                raise UserError(
                    f"{self.path}: the train split has {self._shuffle.samples} samples of {self.block_size} tokens, "
                    f"fewer than an optimizer step's {self._share(True).step}: take a smaller batch_size or more text"
                )
        if stage != "fit" or self.trainer is None or self.trainer.limit_val_batches != 0:
            split = self._eval_split(stage)
            self._open_stream(split) if self.format == TEXT else self._open_rows(split)

    def _make_shuffle(self) -> Shuffle:
        """The order of the training samples, which are opened."""
        if self.format != TEXT:
            return shuffle_rows(self._open_rows("train"), self.seed)
        train = self._open_stream("train")
        return Shuffle(len(train), self.block_size, self.seed, self._window_tokens(train))

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
        if trainer is None:
            return RankShare(self.batch_size)
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        if train:
            check_divisible(self.batch_size, ranks)
        pin = trainer.strategy.root_device.type == "cuda"
        return RankShare(max(1, self.batch_size // ranks), ranks, trainer.global_rank, accumulate if train else 1, pin)

    # Loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        """Shuffled samples, from the cursor on."""
        assert self._shuffle is not None, "setup('fit') comes first"
        if self.format != TEXT:
            return ConversationTrainLoader(self._open_rows("train"), self._shuffle, self._cursor, self._share(True))
        return TrainLoader(
            self._open_stream("train"), self._shuffle, self._cursor, self._share(True), self._n_vocab, self._prefetch
        )

    def val_dataloader(self) -> EvalLoader:
        """All windows of the validation split, or all its rows of conversations, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> EvalLoader:
        """The same of the test split, or else of the validation split."""
        return self._eval_dataloader(self._eval_split("test"))

    def _eval_dataloader(self, split: str) -> EvalLoader:
        share = self._share(False)
        if self.format != TEXT:
            return ConversationEvalLoader(self._open_rows(split), share)
        return EvalLoader(self._open_stream(split), self.block_size, share, self._n_vocab)

    def example_prompts(self, count: int) -> list[list[int]]:
        """The first conversations of the validation split up to the assistant's first turn, as ids; none of text."""
        return [] if self.format == TEXT else [ids.tolist() for ids in self._open_rows("val").prompts(count)]

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
            "fingerprint": (self._streams if self.format == TEXT else self._rows)["train"].fingerprint,
            "block_size": self.block_size,
            "seed": self.seed,
            "window": self._shuffle.window,
            **({} if versions is None else {"versions": versions}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's cursor.

        Raises:
            UserError: it is a position in other data, or in another order.
        """
        if self._shuffle is None or (self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING):
            return
        for name, value in self._identity().items():
            if name == "versions" and name not in state_dict:
                continue  # an earlier checkpoint: it does not say
            if state_dict.get(name) != value:
                raise UserError(self._refusal(name, state_dict.get(name), value))
        self._cursor.reset(state_dict["epoch"], state_dict["position"])

    def _refusal(self, name: str, saved: Any, now: Any) -> str:
        if name in ("fingerprint", "versions"):
            return (
                f"{self.path}: its training tokens are not those that the run was trained on ({name} {now[:12]}, "
                f"the checkpoint's is {str(saved)[:12]}): name the run's data, or start a new run with --init_from"
            )
        key = "shuffle_tokens" if name == "window" else name
        return (
            f"data.{key} gives {name} {now}, the run's is {saved}, and the order of samples depends on it: leave it "
            "out, or start a new run with --init_from"
        )


def check_divisible(batch_size: int, ranks: int) -> None:
    """Refuse a training batch that can't be divided evenly among `ranks`. Raises UserError with one that can."""
    if batch_size % ranks:
        raise UserError(
            f"data.batch_size={batch_size} can't be divided among {ranks} ranks: take {-(-batch_size // ranks) * ranks}"
        )
