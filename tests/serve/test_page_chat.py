"""The page's Chat tab in headless Chromium with a real server: answers, colours, stop, retry, the context's end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chat_models import NEVER, chat_gpt, chatml_tokenizer
from serving import CHROMIUM, Serving, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"{CHROMIUM} is not there")]

Visit = Callable[..., Any]
Start = Callable[..., Serving]
READY = "#chat-send:not([disabled])"


@pytest.fixture(scope="module")
def talker() -> Iterator[Serving]:
    """A server whose model ends most answers itself."""
    with serving(model=chat_gpt(seed=1, end=2.5, block_size=512), tokenizer=chatml_tokenizer()) as running:
        yield running


def open_chat(visit: Visit, server: Serving, **options: Any) -> Any:
    page = visit(server, **options)
    page.click("#tab-chat")
    page.fill("#temperature", "0")
    page.fill("#chat-length", "40")
    return page


def say(page: Any, text: str) -> None:
    page.fill("#chat-message", text)
    page.press("#chat-message", "Enter")
    page.wait_for_selector(READY)


def reply(server: Serving, *turns: tuple[str, str], **body: Any) -> dict[str, Any]:
    """The greedy answer of the server, with what it says of each token."""
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"temperature": 0, "max_tokens": 40, "logprobs": True, "top_logprobs": 6, **body}
    answer = server.post("/v1/chat/completions", {"messages": messages, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def sent(page: Any) -> list[list[dict[str, str]]]:
    """The messages of each request of the chat from now on, in a list that grows."""
    found: list[list[dict[str, str]]] = []

    def note(request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            found.append(json.loads(request.post_data)["messages"])

    page.on("request", note)
    return found


def written(page: Any, number: int = -1) -> str:
    """The text of an answer; the sign of its end is left out."""
    sheets = page.locator("#chat-turns .answer")
    sheet = sheets.nth(number if number >= 0 else sheets.count() + number)
    return "".join(sheet.locator(".token:not(.sign)").all_text_contents())


def test_a_conversation_is_what_the_server_answers(talker: Serving, visit: Visit) -> None:
    page = open_chat(visit, talker)
    assert not page.locator("#start").is_visible()
    assert not page.locator("#chat-models").is_visible()  # there is one only
    requests = sent(page)
    page.fill("#chat-system", "Be brief.")
    say(page, "hello")
    turns = [("system", "Be brief."), ("user", "hello")]
    first = reply(talker, *turns)["message"]["content"]
    assert written(page) == first
    page.fill("#chat-system", "Be kind.")  # for the answers to come
    say(page, "and\n<b>you</b>?")
    turns = [("system", "Be kind."), ("user", "hello"), ("assistant", first), ("user", "and\n<b>you</b>?")]
    assert written(page) == reply(talker, *turns)["message"]["content"]
    assert [(each["role"], each["content"]) for each in requests[1]] == turns
    assert page.locator("#chat-turns .question").all_text_contents() == ["hello", "and\n<b>you</b>?"]
    assert page.locator("#chat-turns b").count() == 0 and page.input_value("#chat-message") == ""
    assert "tokens/s" in page.locator("#chat-stats").text_content()
    page.click("#chat-clear")
    assert page.locator("#chat-turns .exchange").count() == 0


def test_each_token_has_the_colour_of_its_likelihood_and_its_alternatives(talker: Serving, visit: Visit) -> None:
    import math

    page = open_chat(visit, talker)
    say(page, "hello")
    answer = reply(talker, ("user", "hello"), return_token_ids=True)
    content = answer["logprobs"]["content"]
    tokens = page.locator("#chat-turns .token")
    assert tokens.count() == len(content) > 3
    assert [int(each.get_attribute("data-id")) for each in tokens.all()] == answer["token_ids"]
    for i, entry in enumerate(content):
        shade = sum(math.exp(entry["logprob"]) >= edge for edge in (0.01, 0.05, 0.2, 0.5))
        assert f"p{shade}" in tokens.nth(i).get_attribute("class").split()
    tokens.nth(1).hover()
    rows = page.locator("#card .card-row")
    names = [row.locator("span").first.text_content() for row in rows.all()]
    others = [other["token"].replace(" ", "␣") for other in content[1]["top_logprobs"]]
    assert names == [name for name in others if name != content[1]["token"].replace(" ", "␣")]
    assert content[-1]["bytes"] == [] and "end of text" in tokens.last.text_content()


def test_stop_keeps_what_is_written_and_stops_the_server_too(start: Start, visit: Visit) -> None:
    slow = start(model=chat_gpt(seed=1, end=NEVER), tokenizer=chatml_tokenizer(), seconds=0.05)
    page = open_chat(visit, slow)
    page.fill("#chat-length", "200")
    requests = sent(page)
    page.fill("#chat-message", "hello")
    page.click("#chat-send")
    page.locator("#chat-turns .token").nth(3).wait_for()
    page.click("#chat-stop")
    page.wait_for_selector(READY)
    slow.wait_until_idle()
    assert slow.metric("client_disconnects_total") == 1
    kept = written(page)
    assert 4 <= len(kept) < 100
    page.fill("#chat-length", "3")
    say(page, "more")
    assert [each["content"] for each in requests[1]] == ["hello", kept, "more"]
    assert len(written(page)) == 3 and "cut off" in page.locator("#chat-stats").text_content()


def test_answer_again_replaces_the_answer(talker: Serving, visit: Visit) -> None:
    page = open_chat(visit, talker)
    requests = sent(page)
    say(page, "one")
    say(page, "two")
    page.fill("#temperature", "2")
    before = written(page)
    for _ in range(3):
        page.click("#chat-retry")
        page.wait_for_selector(READY)
    assert requests[1] == requests[2] == requests[4] and len(requests) == 5
    assert page.locator("#chat-turns .exchange").count() == 2 and page.input_value("#chat-message") == ""
    assert page.locator("#chat-turns .question").all_text_contents() == ["one", "two"] and written(page) != before


def test_where_the_context_is_full_the_oldest_messages_are_left_out(start: Start, visit: Visit) -> None:
    server = start(model=chat_gpt(seed=1, end=NEVER, block_size=96), tokenizer=chatml_tokenizer())
    page = open_chat(visit, server, quiet=False)  # each refused attempt is in the console by itself
    requests = sent(page)
    page.fill("#chat-length", "20")
    for text in ("one", "two", "three"):
        say(page, text)
    assert [len(each) for each in requests] == [1, 3, 5, 3]  # the third does not fit and is sent again with less
    assert requests[-1][0]["content"] == "two"
    assert page.locator("#chat-turns .exchange.left-out .question").all_text_contents() == ["one"]
    assert "the oldest 2 messages are not sent" in page.locator("#chat-leftout").text_content()
    page.fill("#chat-message", "x" * 200)
    page.press("#chat-message", "Enter")
    page.wait_for_selector("#error:visible")
    assert "exceed" in page.locator("#error").text_content()
    page.wait_for_selector(READY)
    assert page.input_value("#chat-message") == "x" * 200  # nothing that was typed is lost
    assert page.locator("#chat-turns .exchange").count() == 3
    assert page.locator("#chat-turns .exchange.left-out").count() == 1


def test_a_model_without_a_template_says_why_it_cannot_chat(server: Serving, visit: Visit) -> None:
    page = visit(server)
    assert "no chat template" in page.get_attribute("#tab-chat", "title")
    page.click("#tab-chat")
    assert "configs/chat.yaml" in page.locator("#chat-reason").text_content()
    assert page.is_disabled("#chat-message") and page.is_disabled("#chat-send") and page.is_disabled("#chat-system")
    page.click("#language")
    assert "对话模板" in page.locator("#chat-reason").text_content()


def test_where_there_are_several_models_one_is_chosen(talker: Serving, visit: Visit) -> None:
    """As with adapters, each of which is a model of the API."""

    def two_models(route: Any) -> None:
        (card,) = talker.get("/v1/models").json()["data"]
        route.fulfill(json={"object": "list", "data": [card, {**card, "id": "poet"}]})

    def without_template(route: Any) -> None:
        route.fulfill(json={**talker.get("/tokenizer_info").json(), "chat_template": None})

    page = open_chat(visit, talker, quiet=False, routes={"**/models": two_models})
    page.fill("#chat-length", "3")
    assert page.input_value("#chat-model") == "tiny" and page.locator("#chat-model option").count() == 2
    say(page, "hello")
    assert written(page) == reply(talker, ("user", "hello"), max_tokens=3)["message"]["content"] != ""
    page.select_option("#chat-model", "poet")
    say(page, "hello")
    assert "no such model here" in page.locator("#error").text_content()  # it was asked for by its name
    page.route("**/tokenizer_info", without_template)
    page.select_option("#chat-model", "tiny")
    page.reload()
    page.wait_for_selector(".bar")
    page.click("#tab-chat")
    assert page.input_value("#chat-model") == "poet" and page.is_enabled("#chat-message")


def test_the_tab_in_chinese_on_a_phone_by_keyboard(talker: Serving, visit: Visit) -> None:
    size = {"width": 360, "height": 740}
    page = open_chat(visit, talker, locale="zh-CN", viewport=size, is_mobile=True, has_touch=True)
    assert page.locator("#tab-chat").text_content() == "聊天"
    say(page, "你好")
    page.press("#chat-message", "Shift+Enter")
    assert page.input_value("#chat-message") == "\n"  # and nothing is sent
    assert page.locator("#chat-turns .exchange").count() == 1
    assert page.locator("[data-t]:visible").evaluate_all("all => all.every(node => node.textContent.trim())")
    nameless = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
        "all => all.filter(one => !(one.textContent.trim() || one.labels?.length || one.ariaLabel)).length"
    )
    assert nameless == 0 and page.evaluate("() => document.documentElement.scrollWidth") == 360
    page.click("#language")
    assert page.locator("#chat-turns .token").first.get_attribute("aria-label").startswith("“")
    assert page.locator("#chat-send").text_content() == "Send"
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-next-token").get_attribute("aria-selected") == "true"
    assert page.locator("#start").is_visible()
