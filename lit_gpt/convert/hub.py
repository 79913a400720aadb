"""Models of the Hugging Face hub, by way of `huggingface_hub`: its cache, resuming, token and environment variables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from lit_gpt.console.messages import note
from lit_gpt.convert.hf import weight_map
from lit_gpt.errors import UserError

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
OLDER_TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer.model"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def fetch_description(repository: str) -> Path:
    """Download config and tokenizer; the folder that holds them, which is named by its commit.

    Raises:
        UserError: if there is no such repository, it needs a token, or it can be had neither online nor from the cache.
    """
    with _in_one_line(repository):
        folder = Path(hf_hub_download(repository, "config.json")).parent
    for name in TOKENIZER_FILES:
        _fetch_if_there(repository, folder, name)
    if not (folder / TOKENIZER_FILES[0]).is_file():
        for name in OLDER_TOKENIZER_FILES:
            _fetch_if_there(repository, folder, name)
    return folder


def cached_folder(repository: str) -> Path | None:
    """The folder, named by its commit, in which the cache has this repository; None if it has not."""
    cached = try_to_load_from_cache(repository, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def fetch_weights(repository: str, folder: Path) -> None:
    """Download the safetensors into `folder`, which `fetch_description` gave; what is cached is not loaded again.

    Raises:
        UserError: as `fetch_description`, or if a file arrived damaged; it is then removed from the cache.
    """
    _fetch_if_there(repository, folder, INDEX)
    sharded = (folder / INDEX).is_file()
    for name in sorted(set(weight_map(folder / INDEX).values())) if sharded else [SINGLE]:
        cached = isinstance(try_to_load_from_cache(repository, name, revision=folder.name), str)
        if not cached:
            note(f"downloading {name} of {repository}")  # huggingface_hub's own bars are for terminals only
        _fetch_if_there(repository, folder, name)
        if not cached:
            _check_digest(folder / name)


def _fetch_if_there(repository: str, folder: Path, name: str) -> None:
    """Download one file of the commit; do nothing if the commit has no such file."""
    with _in_one_line(repository):
        try:
            hf_hub_download(repository, name, revision=folder.name)
        except (EntryNotFoundError, LocalEntryNotFoundError) as error:
            cause = error.__cause__
            answered = getattr(getattr(cause, "response", None), "status_code", None)
            local = isinstance(error, LocalEntryNotFoundError)
            if local and answered != 404 and not isinstance(cause, OfflineModeIsEnabled):
                raise  # the network failed: that says nothing about the file


def _check_digest(path: Path) -> None:
    """The hub names large files by their SHA-256, and its cache stores them under that name."""
    if not path.is_file():
        return  # the folder says so itself, with the remedy
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    with open(blob, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        blob.unlink()
        path.unlink()
        raise UserError(f"{path.name} arrived damaged and was removed: start again to download it anew")


@contextmanager
def _in_one_line(repository: str) -> Iterator[None]:
    """Errors of `huggingface_hub` as one line with the remedy."""
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repository} is gated: accept its licence on https://huggingface.co/{repository} and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repository} is neither a file here nor a repository of the hub: check its name, or set HF_TOKEN if it "
            "is private"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise UserError(
            f"{repository} is neither a file here nor in the hub's cache, and the hub cannot be reached: check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except EntryNotFoundError as error:
        raise UserError(f"{repository} lacks a file: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = "set HF_TOKEN to a valid token" if status in (401, 403) else "try again later"
        raise UserError(f"{repository}: the hub answered {status}: {remedy}") from None
    except OSError as error:
        raise UserError(f"{repository} could not be downloaded ({_first_line(error)}): start again to resume") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
