"""Up onto the hub, against a server on this machine that answers as the hub does; and down again from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import Hub, refused

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import load_model, save_model
from lit_gpt.convert.push import check_access, check_repository
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def hub(server: Any) -> Hub:
    server[0].refusals.clear()
    server[0].calls.clear()
    server[0].repositories.clear()
    return server[0]


@pytest.fixture
def push(server: Any, hub: Hub, tmp_path: Path, tiny_model: GPT) -> Callable[..., Any]:
    """`lit_gpt convert tiny.ckpt [OUTPUT] --push some/pushed --license mit`, with a valid token."""
    save_model(tmp_path / "tiny.ckpt", tiny_model, get_tokenizer("byte"))

    def run(*words: object, to: str = "some/pushed", **environment: str) -> Any:
        words = ("--license", "mit", *words) if "--license" not in words else words
        command = ["convert", tmp_path / "tiny.ckpt", "--push", to, "--samples", "0", *words]
        return server[1](*command, **{"HF_TOKEN": "hf_right", "TMPDIR": str(tmp_path / "temporary"), **environment})

    (tmp_path / "temporary").mkdir()
    return run


def nothing_is_left(tmp_path: Path) -> bool:
    return list((tmp_path / "temporary").iterdir()) == [] and {path.name for path in tmp_path.iterdir()} == {
        "tiny.ckpt",
        "temporary",
    }


@pytest.mark.slow
def test_up_and_down_again(push: Any, server: Any, hub: Hub, tmp_path: Path, tiny_model: GPT) -> None:
    """The very files that were uploaded are downloaded by our own way, and have the same weights."""
    done = push()
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/some/pushed\n"), done.stderr
    repository = hub.repositories["some/pushed"]
    assert set(repository.files) == FILES and not repository.private
    assert len(repository.commits) == 1  # all at once: nobody downloads half a model
    assert ("lfsFile", "model.safetensors") in repository.commits[0]
    assert nothing_is_left(tmp_path)
    _, metadata, text = repository.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(metadata)["license"] == "mit"
    assert text.startswith("\n# some/pushed\n")
    back = server[1]("convert", "some/pushed", tmp_path / "back.ckpt")
    assert back.returncode == 0, back.stderr
    model, tokenizer = load_model(tmp_path / "back.ckpt")
    assert tokenizer is not None and tokenizer.hash == get_tokenizer("byte").hash
    wanted = tiny_model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_folder_that_is_named_stays(push: Any, hub: Hub, tmp_path: Path) -> None:
    done = push(tmp_path / "out", "--private")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n{hub.url}/some/pushed\n"), done.stderr
    repository = hub.repositories["some/pushed"]
    assert repository.private
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == repository.files
    refused(push(tmp_path / "out"), "exists already")


@pytest.mark.slow
def test_a_repository_that_is_there_gets_one_more_commit(push: Any, hub: Hub) -> None:
    """What would be read along with the new model goes, what its owner put there stays."""
    assert push().returncode == 0
    repository = hub.repositories["some/pushed"]
    old = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt", "chat_template.jinja"}
    kept = {"LICENSE", "figures/loss.png", "adapter_model.safetensors", ".gitattributes"}
    repository.files |= dict.fromkeys(old | kept, b"x")
    assert push().returncode == 0
    assert set(repository.files) == FILES | kept and len(repository.commits) == 2
    assert {path for key, path in repository.commits[1] if key == "deletedFile"} == old


@pytest.mark.slow
def test_a_public_repository_does_not_get_what_shall_be_private(push: Any, hub: Hub, tmp_path: Path) -> None:
    assert push().returncode == 0
    refused(push("--private"), "some/pushed is there already and is public")
    assert len(hub.repositories["some/pushed"].commits) == 1
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--license", "mitt"], {}, 'unknown license "mitt": did you mean "mit"?'),
        (["--language", "chinese"], {}, '--language "chinese" is no code of ISO 639'),
        (["--samples", "-1"], {}, "--samples -1 is outside 0 … 20"),
        (["a.ckpt"], {}, "--push uploads a folder, not a.ckpt"),
        ([], {"HF_TOKEN": ""}, "needs a token of the hub that may write: set HF_TOKEN"),
        ([], {"HF_TOKEN": "hf_wrong"}, "the token is not valid; set HF_TOKEN"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_any_work(
    words: list[str], environment: dict[str, str], message: str, push: Any, hub: Hub, tmp_path: Path
) -> None:
    done = push(*words, **environment)
    refused(done, message)
    assert "parameters" not in done.stderr and hub.repositories == {} and nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pushed", "write OWNER/NAME"),
        ("a/b/c", "write OWNER/NAME"),
        ("some/", "write"),
        ("some/a b", "alphanumeric"),
        ("some/a..b", "Cannot have"),
        ("some/" + "x" * 200, "maximum length is 96"),
        ("", "write OWNER/NAME"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_repository(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    if message != "write":
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("/api/repos/create", 403, "the token may not write there; use one with write access to some"),
        ("/preupload/main", 404, "the hub does not know it, or hides it"),
        ("/commit/main", 403, "the token may not write there"),
        ("/commit/main", 412, "it was changed in the meantime"),
        ("/commit/main", 418, "the hub answered 418; try again later"),
        ("/objects/batch", 401, "the token is not valid"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    end: str, status: int, message: str, push: Any, hub: Hub, tmp_path: Path
) -> None:
    hub.refusals[end] = status
    refused(push(), "some/pushed was not uploaded: ", message)
    assert all(not repository.files for repository in hub.repositories.values())
    assert nothing_is_left(tmp_path)


def test_tokens_that_may_only_read_and_owners_that_are_others(push: Any, hub: Hub, tmp_path: Path) -> None:
    refused(push(HF_TOKEN="hf_reader"), "the token may not write there; use one with write access to some")
    refused(push(to="others/model"), "the token may not write there; use one with write access to others")
    assert hub.repositories == {} and nothing_is_left(tmp_path)


def test_a_folder_stays_where_the_upload_fails(push: Any, hub: Hub, tmp_path: Path) -> None:
    hub.refusals["/commit/main"] = 403
    done = push(tmp_path / "out")
    refused(done, "was not uploaded")
    assert done.stdout == f"{tmp_path / 'out'}\n" and {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_model_that_transformers_lacks_makes_no_repository(
    server: Any, hub: Hub, tmp_path: Path, tiny_model: GPT
) -> None:
    from models import tiny_gpt

    save_model(tmp_path / "odd.ckpt", tiny_gpt(dtype=torch.float32, logit_softcap=3.0), get_tokenizer("byte"))
    done = server[1]("convert", tmp_path / "odd.ckpt", "--push", "some/odd", "--license", "mit", HF_TOKEN="hf_right")
    refused(done, "logit_softcap=3.0")
    assert ("POST", "/api/repos/create") not in hub.calls


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "nonsense", "ftp://a"])
def test_no_hub_there(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(UserError, match="check the network and HF_ENDPOINT") as caught:
        check_access("some/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://[", "http://127.0.0.1:99999", "http://", "huggingface.co"])
@pytest.mark.parametrize(
    "words", [["some/model", "a.ckpt"], ["absent.ckpt", "--push", "some/model", "--license", "mit"]]
)
def test_an_address_that_is_none(
    endpoint: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`huggingface_hub` raises ValueError over some of them, when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert main(["convert", *words]) == 2
    printed = capsys.readouterr().err
    assert f"HF_ENDPOINT={endpoint} is no address" in printed and printed.count("\n") == 1


def test_a_server_that_is_no_hub(server: Any, hub: Hub, push: Any) -> None:
    """Its answers are of another kind: an address that was mistyped."""
    hub.answer = b"<html>"
    try:
        refused(push(), "does not answer as the hub does", "check HF_ENDPOINT")
    finally:
        hub.answer = None


@pytest.mark.slow
def test_a_server_without_xet_storage(push: Any, server: Any, hub: Hub, program: Any, tmp_path: Path) -> None:
    """`hf_xet` is used where it is installed; its errors are of a kind of their own."""
    pytest.importorskip("hf_xet")
    settings = server[2] | {"HF_HUB_DISABLE_XET": "0", "HF_TOKEN": "hf_right"}
    words = ["--push", "some/pushed", "--license", "mit", "--samples", "0"]
    refused(program("convert", tmp_path / "tiny.ckpt", *words, **settings), "set HF_HUB_DISABLE_XET=1")
    assert hub.repositories["some/pushed"].files == {}
