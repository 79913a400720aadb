"""`lit_gpt convert --to hf` and `--push`: a Hugging Face folder with its model card, on this disk or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from lit_gpt.console.messages import note
from lit_gpt.convert.endpoint import check_endpoint
from lit_gpt.convert.licences import licence_metadata
from lit_gpt.errors import UserError

if TYPE_CHECKING:
    from lit_gpt.convert.source import SourceCheckpoint

_SAMPLES = 3
_MOST_SAMPLES = 20
_SAMPLED_BYTES = 1 << 30  # weights in fp32 of a model that writes samples unasked: it is read whole for them
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


@dataclass(frozen=True)
class Publication:
    """What the user asks of a Hugging Face folder.

    Attributes:
        licence: its entries of the card's metadata; empty for none.
        languages: of the model's texts.
        samples: how many texts of the model the card shows; None for three by a model that is not large.
        repository: OWNER/NAME of the hub; None for this disk only.
        private: whether a new repository is hidden from others.
    """

    licence: dict[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    samples: int | None = None
    repository: str | None = None
    private: bool = False

    def check_access(self) -> None:
        """Ask the hub whose the token is, where there is something to upload. Raises UserError."""
        if self.repository is not None:
            from lit_gpt.convert.push import check_access

            check_access(self.repository)


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `convert` for Hugging Face folders."""
    add = parser.add_argument
    add("--license", type=str | None, help="for the model card: apache-2.0, or another id of the hub or of SPDX")
    add("--language", type=str | None, help="for the model card: a language's code, or several: zh,en")
    add("--samples", type=int | None, help="texts by the model on its card; 3 if left out, 0 for none")
    add(
        "--push",
        type=str | None,
        help="upload the folder to OWNER/NAME of the Hugging Face hub; OUTPUT can be left out",
    )
    add("--private", action="store_true", help="a new repository is private")


def publication_of(options: Namespace) -> Publication | None:
    """What the options ask for, checked; None for a conversion to another format.

    Raises:
        UserError: for an unknown licence or language, a name that is no repository, options that do not go together.
    """
    if options.push is None and options.to != "hf":
        for name in ("license", "language", "samples", "private"):
            if options[name] is not None and options[name] is not False:
                raise UserError(f"--{name} is for Hugging Face folders: leave it out, or add --to hf")
        if options.output is None:
            raise UserError("convert needs OUTPUT, the file or folder to write: name it")
        return None
    if options.push is None:
        if options.private:
            raise UserError("--private is for --push OWNER/NAME: leave it out, or name the repository")
        if options.output is None:
            raise UserError("--to hf needs OUTPUT, the folder to write, or --push OWNER/NAME: name one of them")
    if options.samples is not None and not 0 <= options.samples <= _MOST_SAMPLES:
        raise UserError(f"--samples {options.samples} is outside 0 … {_MOST_SAMPLES}: choose a number inside")
    licence = {} if options.license is None else licence_metadata(options.license)
    languages = _languages(options.language)
    if options.push is not None:
        _check_push(options)
    return Publication(licence, languages, options.samples, options.push, options.private)


def _check_push(options: Namespace) -> None:
    if options.output is not None and Path(options.output).suffix in (".ckpt", ".gguf", ".pt", ".pth"):
        raise UserError(f"--push uploads a folder, not {options.output}: leave OUTPUT out, or name a folder")
    if options.license is None:
        raise UserError("--push needs --license: others may use a model only under one; apache-2.0 is usual")
    check_endpoint()
    from lit_gpt.convert.push import check_repository

    check_repository(options.push)


def _languages(text: str | None) -> tuple[str, ...]:
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if not _LANGUAGE.fullmatch(name):
            raise UserError(f'--language "{name[:80]}" is no code of ISO 639: write zh, en or zh,en')
    return names


def publish(source: SourceCheckpoint, output: Path | None, publication: Publication) -> Iterator[str]:
    """Write the folder, and upload it if that was asked for.

    Args:
        source: the model.
        output: the folder; None where it is only uploaded.
        publication: what was asked for.

    Yields:
        Where the model is: the folder's path, and the repository's address.

    Raises:
        UserError: if the folder exists, no architecture of transformers expresses the model, or the hub refuses it.
    """
    from lit_gpt.convert.write import write_hf

    name = publication.repository or (output or Path()).name
    with _folder(output) as folder:
        write_hf(source, folder, _card(source, name, publication))
        if output is not None:
            yield str(output)
        if publication.repository is not None:
            from lit_gpt.convert.push import push_folder

            yield push_folder(folder, publication.repository, publication.private)


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """The folder to write: the user's, or one that is removed at the end."""
    if output is not None:
        yield output
        return
    with TemporaryDirectory(prefix="lit_gpt-") as temporary:
        yield Path(temporary) / "model"


def _card(source: SourceCheckpoint, name: str, publication: Publication) -> str:
    from lit_gpt.convert.hf_architectures import write_config
    from lit_gpt.convert.model_card import CardDetails, model_card
    from lit_gpt.convert.source import without_padding

    (architecture,) = write_config(source.config, source.name)["architectures"]
    counts = [stored.nbytes // stored.dtype.itemsize for stored in without_padding(source).values()]
    details = CardDetails(
        name, architecture, sum(counts), publication.licence, publication.languages, _samples(source, publication)
    )
    return model_card(source, details)


def _samples(source: SourceCheckpoint, publication: Publication) -> list[str]:
    """Texts by the model, with a line where there are none though some were to be expected."""
    count = _SAMPLES if publication.samples is None else publication.samples
    large = sum(stored.nbytes // stored.dtype.itemsize for stored in source.weights.values()) * 4 > _SAMPLED_BYTES
    if count == 0:
        return []
    if source.tokenizer is None:
        note("no samples on the card: the model has no tokenizer")
        return []
    if large and publication.samples is None:
        note("no samples on the card: the model would be read whole for them; --samples 3 does so")
        return []
    from lit_gpt.convert.card_samples import sample_texts

    texts = sample_texts(source.to("float32").load(), source.tokenizer, count)
    if not texts:
        note("no samples on the card: the model's logits are no numbers, or its context is one token")
    return texts
