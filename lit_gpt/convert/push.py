"""Models onto the Hugging Face hub, by way of `huggingface_hub`: a folder as one commit of a repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError

_NO_ANSWER: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
"""What the library lets through when there is no answer: the base class of its own errors is that of the HTTP client
that it uses, which is another one from version to version."""
_FAILURES: tuple[type[BaseException], ...] = (*_NO_ANSWER, RuntimeError, ValueError, KeyError, TypeError)
"""And what it raises over an answer that is none of the hub's, or where one of several files fails."""
_READ_ALONG = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|tokenizer(_config)?\.json|tokenizer\.model|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.jinja"
)
"""Files of an earlier model that would be read along with the new one's."""


def check_repository(repository: str) -> None:
    """Raise UserError if this is no OWNER/NAME as the hub takes them."""
    fault = "write OWNER/NAME, such as my-name/my-model"
    if repository.count("/") == 1:
        try:
            return validate_repo_id(repository)
        except HFValidationError as error:
            fault = _one_line(error)
    raise UserError(f"--push {repository[:100]} is no repository of the hub: {fault}")


def check_access(repository: str) -> None:
    """Ask the hub whose the token is, before any work.

    Raises:
        UserError: if there is no token, it is not valid, or the hub cannot be reached.
    """
    with _in_one_line(repository):
        if get_token() is None:
            raise UserError(
                f"--push {repository} needs a token of the hub that may write: set HF_TOKEN, or log in with "
                "`hf auth login`"
            )
        HfApi().whoami()


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """All files of `folder` as one commit; a repository that is not there is made.

    Of a repository that is there the files that are read along with a model are replaced or removed. Its history keeps
    them.

    Args:
        folder: without folders in it.
        repository: OWNER/NAME.
        private: whether nobody else may see it.

    Returns:
        Its address.

    Raises:
        UserError: if the hub refuses it or cannot be reached, or the repository is public and shall be private.
    """
    api = HfApi()
    names = sorted(path.name for path in folder.iterdir())
    size = sum((folder / name).stat().st_size for name in names)
    with _in_one_line(repository):
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        found = api.model_info(repository)
        if private and not found.private:
            raise UserError(
                f"{repository} is there already and is public: make it private in its settings first, or leave "
                "--private out"
            )
        there = {item.rfilename for item in found.siblings or ()}
        stale = sorted(name for name in there.difference(names) if _READ_ALONG.fullmatch(name))
        note(f"uploading {len(names)} files, {size / 2**20:.1f} MiB, to {address}")
        # Its upload_folder makes several commits where it can: a model could be had in halves.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in names),
            *(CommitOperationDelete(name) for name in stale),
        ]
        api.create_commit(repository, operations, commit_message="Model written by lit_gpt convert")
    return address


@contextmanager
def _in_one_line(repository: str) -> Iterator[None]:
    """Errors of `huggingface_hub` as one line with the remedy."""
    try:
        yield
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(f"{repository} was not uploaded: {_remedy(error, repository)}") from None


def _remedy(error: BaseException, repository: str) -> str:
    """What went wrong and what to do about it."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one of several files
        return _remedy(error.__cause__, repository)
    if isinstance(error, HfHubHTTPError):
        return _answer(error, repository)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids it; unset that"
    if "xet" in str(error).replace(repository, ""):  # as in the address of the hub's storage for large files
        return f"its Xet storage failed ({_one_line(error)}); check the network, or set HF_HUB_DISABLE_XET=1"
    if isinstance(error, _NO_ANSWER):
        return f"{constants.ENDPOINT} cannot be reached ({_one_line(error)}); check the network and HF_ENDPOINT"
    return (
        f"{constants.ENDPOINT} does not answer as the hub does ({type(error).__name__}: {_one_line(error)}); "
        "check HF_ENDPOINT"
    )


def _answer(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code if error.response is not None else None
    remedies = {
        400: f"it is refused ({error.server_message or _one_line(error)})",
        401: "the token is not valid; set HF_TOKEN to one that is and may write",
        403: f"the token may not write there; use one with write access to {repository.partition('/')[0]}",
        404: "the hub does not know it, or hides it from this token; check its name and HF_TOKEN",
        412: "it was changed in the meantime; start again",
    }
    return remedies.get(status or 0, f"the hub answered {status}; try again later")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
