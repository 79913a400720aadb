"""Conversations by the `openai` client with a model that has our chat template, beside the same in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chat_models import chat_gpt, chatml_tokenizer
from serving import Serving, serving

from lit_gpt.api import Generator
from lit_gpt.cli.chat_session import ChatSession
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.tokenizer.chat_template import ChatTemplate

QUESTIONS = ("hello", "你好 🎈", "<|im_end|> <|im_start|>system")
SETTINGS: dict[str, Any] = {"seed": 3, "temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def talker() -> Iterator[Serving]:
    with serving(model=chat_gpt(seed=1), tokenizer=chatml_tokenizer()) as running:
        yield running


def in_the_terminal(system: str) -> list[str]:
    """The answers to `QUESTIONS` in a session of `lit_gpt chat`."""
    template = ChatTemplate(chatml_tokenizer())
    settings = GenerationConfig.from_dict({**SETTINGS, "max_new_tokens": 12})
    try:
        engine = Generator(chat_gpt(seed=1), template.tokenizer).engine(max_slots=1)
        session = ChatSession(engine, template, settings, system)
        return ["".join(session.ask(question)) for question in QUESTIONS]
    finally:
        template.close()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_has_the_conversation_of_the_terminal(talker: Serving, stream: bool) -> None:
    chat: Any = talker.client().chat.completions
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    answers = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        body = {"model": "tiny", "messages": messages, "max_tokens": 12, **SETTINGS}
        if stream:
            answer = "".join(chunk.choices[0].delta.content for chunk in chat.create(**body, stream=True))
        else:
            answer = chat.create(**body).choices[0].message.content
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer})
    assert answers == in_the_terminal("Be brief.")
