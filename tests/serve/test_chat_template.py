"""Chat templates run in a process of their own: one that does not end, or takes all memory, is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import Serving, make_model

from lit_gpt.serve.chat_template import TemplateFailed, TemplateRenderer
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

Start = Callable[..., Serving]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(seconds=0.5)
    yield renderer
    renderer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ 'a' * 99999999999 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%99999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('only\nusers') }}",
        "{% if %}",
        "{{ messages[7].content }}",
    ],
)
def test_a_template_that_fails_or_does_not_end_is_one_line(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateFailed) as error:
        renderer.render(template, {"messages": []})
    assert str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1100
    assert renderer.render("{{ x }}\u2028é", {"x": 3}) == "3\u2028é"  # the next one has a process again


def test_a_child_that_was_ended_is_started_again(renderer: TemplateRenderer) -> None:
    assert renderer.render("a", {}) == "a"
    child = renderer._child
    assert child is not None
    child.kill()
    child.wait()
    assert renderer.render("b", {}) == "b"
    renderer.close()
    assert renderer._child is None and child.poll() is not None


def test_a_module_in_the_current_folder_is_not_run(
    renderer: TemplateRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("open('was-run', 'w')")
    (tmp_path / "jinja2.py").write_text("open('was-run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert renderer.render("a", {}) == "a"
    assert not (tmp_path / "was-run").exists()


@pytest.mark.slow
def test_others_are_answered_while_a_template_does_not_end(start: Start, chat_tokenizer: Tokenizer) -> None:
    server = start(tokenizer=replace(chat_tokenizer, chat_template=ENDLESS))
    server.service.templates.seconds = 0.5
    body = {"messages": [{"role": "user", "content": "a"}]}
    with ThreadPoolExecutor(2) as pool:
        chats = [pool.submit(server.post, "/v1/chat/completions", body) for _ in range(2)]
        began, slowest = time.perf_counter(), 0.0
        while not all(chat.done() for chat in chats):
            asked = time.perf_counter()
            server.complete(prompt="a", max_tokens=1)
            slowest = max(slowest, time.perf_counter() - asked)
    answers = [chat.result() for chat in chats]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert "it did not end within 0.5 s" in answers[0].text
    assert slowest < (time.perf_counter() - began) / 2


def test_a_chat_of_a_million_spaces_is_a_400(start: Start, chat_tokenizer: Tokenizer) -> None:
    """tiktoken raises ValueError where the regular expression's stack ends."""
    specials: dict[str, Any] = chat_tokenizer.specials
    tokenizer = replace(
        Tokenizer.build("spaces", GPT2, get_tokenizer("byte").ranks, specials, normalization="NFC"),
        chat_template=chat_tokenizer.chat_template,
    )
    assert len(tokenizer.encode_with_specials("<|im_start|>" + " " * 1_000_000 + "x")) == 1_000_002
    server = start(model=make_model(vocab_size=259), tokenizer=tokenizer)
    for path, body in [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": " " * 1_000_000 + "x"}]}),
        ("/v1/completions", {"prompt": " " * 1_000_000 + "x"}),
    ]:
        error = server.post(path, body).json()["error"]
        assert error["code"] == "context_length_exceeded", error
    assert server.post("/tokenize", {"prompt": " " * 1_000_000 + "x"}).json()["count"] == 1_000_001
