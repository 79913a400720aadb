"""Adapters as models of the API: listed, chosen by a request, batched over one base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_adapter, save_base
from fastapi.testclient import TestClient

from lit_gpt.api import load
from lit_gpt.errors import UserError
from lit_gpt.serve.app import create_app
from lit_gpt.serve.main import build_service
from lit_gpt.serve.options import parse

SETTINGS: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    base = save_base(folder / "base.ckpt")
    paths = {"base": str(base)}
    for seed, name in enumerate(("poet", "clerk"), 1):
        paths[name] = str(save_adapter(folder / f"{name}.ckpt", base, seed))
    paths["chat"] = str(save_adapter(folder / "chat.ckpt", base, 3, chat=True))
    return paths


def options(files: dict[str, str], *names: str) -> list[str]:
    words = [word for name in names for word in ("--adapter", f"{name}={files[name]}")]
    return ["--ckpt_path", files["base"], "--max_slots", "4", "--precision", "fp32", *words]


@pytest.fixture(scope="module")
def client(files: dict[str, str]) -> Iterator[TestClient]:
    parsed = parse(options(files, "poet", "clerk", "chat"))
    with TestClient(create_app(build_service(parsed, parsed.ckpt_path)), base_url="http://localhost") as running:
        yield running


def complete(client: TestClient, model: str | None, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={**SETTINGS, "prompt": "ROMEO:", "model": model, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_all_are_listed(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["base", "poet", "clerk", "chat"]
    assert client.get("/v1/models/clerk").json()["id"] == "clerk"
    for path in ("/v1/models/nobody",):
        assert client.get(path).status_code == 404


@pytest.mark.slow
def test_each_continues_as_its_merged_model_does(client: TestClient, files: dict[str, str]) -> None:
    texts = {}
    for name in ("base", "poet", "clerk"):
        answer = complete(client, name)
        assert answer["model"] == name
        settings = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        assert answer["choices"][0]["text"] == load(files[name], "fp32").generate("ROMEO:", **settings)
        texts[name] = answer["choices"][0]["text"]
    assert len(set(texts.values())) == 3
    assert complete(client, None)["choices"][0]["text"] == texts["base"]
    assert complete(client, "poet")["choices"][0]["text"] == texts["poet"]  # with all of them in the prefix cache


def test_an_unknown_model_is_refused(client: TestClient) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/next_token", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
    ]:
        answer = client.post(path, json={**body, "model": "nobody"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_an_adapter_that_was_taught_to_chat_answers(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "model": "chat", "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "chat"
    for name in ("base", "poet"):
        refused = client.post("/v1/chat/completions", json={"messages": messages, "model": name})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_chat_template"
    tokens = {"prompt": [257, 72, 258], "model": "chat"}
    assert client.post("/v1/completions", json={**SETTINGS, **tokens}).status_code == 200
    assert client.post("/v1/completions", json={**SETTINGS, **tokens, "model": "poet"}).status_code == 400


def test_the_next_token_is_the_adapters(client: TestClient) -> None:
    seen = {}
    for name in ("base", "poet"):
        body = {"prompt": "ROMEO:", "model": name, "temperature": 0}
        answer = client.post("/v1/next_token", json=body).json()
        assert answer["model"] == name
        seen[name] = answer["draw"]["token"]["id"], answer["candidates"][0]["raw"]
    assert seen["base"] != seen["poet"]


def test_from_python(files: dict[str, str]) -> None:
    gpt = load(files["base"], "fp32", adapters={"poet": files["poet"], "clerk": files["clerk"]})
    settings = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    for name in ("poet", "clerk"):
        assert gpt.generate("x", adapter=name, **settings) == load(files[name], "fp32").generate("x", **settings)
    with pytest.raises(UserError, match=r'there is no adapter "poets": did you mean "poet"'):
        gpt.generate("x", adapter="poets")
    with pytest.raises(UserError, match=r"none was loaded"):
        load(files["base"]).generate("x", adapter="poet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["poet"], "--adapter poet is not NAME=PATH"),
        (["a b=x"], '"a b" is no name'),
        (["p={poet}", "p={clerk}"], r'names two adapters "p"'),
        (["base={poet}"], r'the model and an adapter are both "base"'),
        (["p=nowhere.ckpt"], "the adapter nowhere.ckpt does not exist"),
        (["p={base}"], "is a whole model, no adapter"),
        (["p={folder}"], "has no adapter_config.json"),
        (["p={other}"], r"adapter .*other.ckpt was trained on another base than .*base.ckpt"),
    ],
)
def test_bad_adapters_are_refused_before_serving(
    words: list[str], message: str, files: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    other = save_adapter(tmp_path / "other.ckpt", save_base(tmp_path / "base.ckpt", seed=7), 1)
    known = {**files, "folder": str(tmp_path), "other": str(other)}
    named = [part for word in words for part in ("--adapter", word.format(**known))]
    with pytest.raises(UserError, match=message):
        parsed = parse([*options(files), *named])
        build_service(parsed, parsed.ckpt_path)
