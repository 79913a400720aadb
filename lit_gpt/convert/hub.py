"""Models of the Hugging Face hub, by way of `huggingface_hub`: its cache, resuming, token and environment variables."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from lit_gpt.convert.hf import shard_of
from lit_gpt.errors import UserError

SMALL = ["*.json", "merges.txt", "tokenizer.model", "chat_template.jinja"]
"""Everything but the weights. Subfolders hold other formats and are left out."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def fetch_description(repository: str) -> Path:
    """Download config, tokenizer and index; the folder that holds them.

    Raises:
        UserError: if there is no such repository, it needs a token, or it can be had neither online nor from the cache.
    """
    with _explained(repository):
        return Path(snapshot_download(repository, allow_patterns=SMALL, ignore_patterns=["*/*"]))


def fetch_weights(repository: str, folder: Path) -> None:
    """Download the safetensors into `folder`, which `fetch_description` gave; what is cached is not loaded again.

    Raises:
        UserError: as `fetch_description`, or if a file arrived damaged; it is then removed from the cache.
    """
    index = folder / INDEX
    names = sorted(set(shard_of(index).values())) if index.is_file() else [SINGLE]
    commit = folder.name
    new = [name for name in names if not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)]
    with _explained(repository):
        if new:
            snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(name) for name in new])
    for name in new:
        _check_digest(folder / name)


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
def _explained(repository: str) -> Iterator[None]:
    """What went wrong, in one line with the remedy."""
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
