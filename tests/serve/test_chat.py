"""`/v1/chat/completions` with templates and texts that take long."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from serving import Serving, make_model

from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

Start = Callable[..., Serving]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


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


@pytest.mark.slow
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
