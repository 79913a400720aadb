"""The page in headless Chromium with a real server: it shows what the server answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pages import ascii_model, byte_tokenizer, flip, prompt
from serving import CHROMIUM, Serving, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"{CHROMIUM} is not there")]


@pytest.fixture(scope="module")
def words() -> Iterator[Serving]:
    with serving(model=ascii_model(3), tokenizer=byte_tokenizer()) as running:
        yield running


def generated(page: Any, lane: int = 0) -> str:
    return "".join(page.locator(".lane").nth(lane).locator(".token").all_text_contents())


def test_flips_write_the_completion_of_that_seed_and_another_token_can_be_chosen(
    words: Serving, visit: Callable[..., Any]
) -> None:
    """Flipping five times writes what a completion with the same seed writes; bars and line are the server's.

    Clicking on a token shows the draw that chose it: at the server's random number, in that token's interval.
    """
    page = visit(words)
    prompt(page, "HELLO")
    flip(page, 5)
    whole = words.complete(prompt="HELLO", max_tokens=5, seed=1)["choices"][0]["text"]
    assert generated(page) == whole.replace("\n", "⏎")
    answer = words.post("/v1/next_token", {"prompt": "HELLO", "generated": ids(whole), "seed": 1, "limit": 200}).json()
    assert [int(i) for i in page.locator(".bar").evaluate_all("all => all.map(bar => bar.dataset.id)")] == [
        each["id"] for each in answer["candidates"][:12]
    ]
    lefts = page.locator(".segment").evaluate_all("all => all.map(one => [one.dataset.id, parseFloat(one.style.left)])")
    starts = {str(each["id"]): 100 * each["start"] for each in answer["candidates"] if each["probability"] > 0}
    assert len(lefts) == len(starts) and all(abs(starts[i] - left) < 1e-3 for i, left in lefts)
    page.locator(".token").first.click()
    page.wait_for_selector(".coin:not([hidden])")
    draw = words.post("/v1/next_token", {"prompt": "HELLO", "seed": 1}).json()["draw"]
    assert abs(float(page.locator(".coin").evaluate("coin => parseFloat(coin.style.left)")) - 100 * draw["u"]) < 1e-3
    assert f"{draw['u']:.4f}" in page.locator(".fell").text_content()
    assert page.locator(".segment.hit").get_attribute("data-id") == str(draw["token"]["id"])
    check_another_token(page)
    check_sliders(page, words)


def ids(text: str) -> list[int]:
    return [(ord(letter) - 32) % 256 for letter in text]


def check_another_token(page: Any) -> None:
    """Another token can be chosen instead of the second one, and the choice undone."""
    first = generated(page)
    page.locator(".token").nth(1).click()
    playwright.expect(page.locator(".token").nth(1)).to_contain_class("here")
    other = next(
        bar for bar in page.locator(".bar").all() if bar.locator(".name").text_content() not in (first[1], "␣")
    )
    name = other.locator(".name").text_content()
    other.click()
    playwright.expect(page.locator(".token")).to_have_count(2)
    assert generated(page) == first[0] + name
    page.click("#back")
    playwright.expect(page.locator(".token")).to_have_count(1)
    page.wait_for_selector("#flip:not([disabled])")
    flip(page)
    assert generated(page) == first[:2]  # the same seed draws the same token
    page.click("#restart")
    playwright.expect(page.locator(".token")).to_have_count(0)


def check_sliders(page: Any, words: Serving) -> None:
    """They reshape, and show what is cut."""
    assert page.locator(".bar.out").count() == 0
    page.fill("#top-k", "2")  # the third step: 3
    playwright.expect(page.locator(".bar.out")).to_have_count(9)
    assert page.locator(".segment").count() == 3 and page.locator("#top-k-value").text_content() == "3"
    assert "top-k" in page.locator(".bar").nth(5).get_attribute("aria-label")
    page.fill("#temperature", "0")
    playwright.expect(page.locator(".segment")).to_have_count(1)
    assert "greedy" in page.locator(".bar.out").first.get_attribute("aria-label")
    flip(page)
    greedy = words.complete(prompt="HELLO", max_tokens=1, temperature=0)["choices"][0]["text"]
    assert generated(page) == greedy


def test_two_seeds_side_by_side_running_and_writing(words: Serving, visit: Callable[..., Any]) -> None:
    page = visit(words)
    prompt(page, "HELLO")
    check_two_seeds(page, words)
    check_writing(page, words)


def check_two_seeds(page: Any, words: Serving) -> None:
    page.click("#compare")
    playwright.expect(page.locator(".lane")).to_have_count(2)
    page.wait_for_selector(".lane:nth-child(2) .bar")
    page.click("#run")
    page.locator(".lane").nth(1).locator(".token").nth(3).wait_for()
    page.click("#run")
    page.wait_for_selector("#flip:not([disabled])")
    for lane, seed in ((0, 1), (1, 2)):
        text = generated(page, lane)
        assert text == words.complete(prompt="HELLO", max_tokens=len(text), seed=seed)["choices"][0]["text"]
    page.click("#compare")
    playwright.expect(page.locator(".lane")).to_have_count(1)


def check_writing(page: Any, words: Serving) -> None:
    """It streams, and opens in a lane."""
    page.click("#tab-write")
    page.fill("#length", "20")
    page.fill("#temperature", "0")
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")
    greedy = words.complete(prompt="HELLO", max_tokens=20, temperature=0)["choices"][0]["text"]
    tokens = page.locator("#sheet .token")
    assert "".join(tokens.all_text_contents()) == greedy
    assert page.locator("#stats").text_content().startswith("20 tokens")
    tokens.nth(4).hover()
    rows = page.locator("#card .card-row")
    assert page.locator("#card").is_visible() and rows.count() >= 5
    tokens.nth(4).click()
    playwright.expect(page.locator(".lane .token")).to_have_count(4)
    assert generated(page) == greedy[:4]


def test_stop_stops_the_server_too(start: Callable[..., Serving], visit: Callable[..., Any]) -> None:
    slow = start(model=ascii_model(3), tokenizer=byte_tokenizer(), seconds=0.05)
    page = visit(slow)
    page.click("#tab-write")
    page.fill("#length", "90")
    page.click("#go")
    page.locator("#sheet .token").nth(3).wait_for()
    page.click("#stop")
    page.wait_for_selector("#go:not([disabled])")
    slow.wait_until_idle()
    assert slow.service.worker.engine.model_runner.forwards < 60 and slow.metric("client_disconnects_total") == 1


def test_both_languages_and_themes(words: Serving, visit: Callable[..., Any]) -> None:
    page = visit(words, locale="zh-CN")
    assert page.locator("#flip").text_content() == "抛一次" and page.locator("html").get_attribute("lang") == "zh-CN"
    prompt(page, "HELLO")
    flip(page)
    page.click("#language")
    assert page.locator("#flip").text_content() == "Flip" and page.locator("html").get_attribute("lang") == "en"
    assert page.locator("[data-t]:visible").evaluate_all("all => all.every(node => node.textContent.trim())")
    page.click("#theme")
    page.click("#theme")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.reload()  # both choices are remembered
    page.wait_for_selector(".bar")
    assert page.locator("#flip").text_content() == "Flip"
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_keyboard_alone_and_markup_in_a_prompt_stays_text(words: Serving, visit: Callable[..., Any]) -> None:
    page = visit(words)
    page.focus("#flip")
    page.keyboard.press("Enter")
    page.locator(".token").first.wait_for()
    page.wait_for_selector("#flip:not([disabled])")
    flip(page)
    page.locator(".token").nth(1).focus()
    page.keyboard.press("ArrowLeft")
    focused = page.evaluate("() => [...document.querySelectorAll('.token')].indexOf(document.activeElement)")
    assert focused == 0 and page.locator("#card").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()
    page.focus("#tab-next-token")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-write").get_attribute("aria-selected") == "true"
    nameless = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
        "all => all.filter(one => !(one.textContent.trim() || one.labels?.length || one.ariaLabel)).length"
    )
    assert nameless == 0 and page.locator("[role=status]").text_content()
    page.click("#tab-next-token")
    prompt(page, "<IMG SRC=X ONERROR=ALERT(1)>")
    assert page.locator(".given").first.text_content() == "<IMG SRC=X ONERROR=ALERT(1)>"
    assert page.locator(".sheet img").count() == 0


def test_a_key_is_asked_for_another_checkpoint_has_other_bars_and_an_error_is_shown(
    words: Serving, start: Callable[..., Serving], visit: Callable[..., Any]
) -> None:
    locked = start(model=ascii_model(4), tokenizer=byte_tokenizer(), api_key="sesame")
    page = visit(locked, wait="dialog[open]", quiet=False)  # a refused request is in the console by itself
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector(".bar")
    shown = page.locator(".bar").evaluate_all("all => all.map(bar => Number(bar.dataset.id))")
    headers = {"Authorization": "Bearer sesame"}
    answers = [each.post("/v1/next_token", {"prompt": "The"}, headers=headers).json() for each in (locked, words)]
    first, other = ([each["id"] for each in answer["candidates"][:12]] for answer in answers)
    assert shown == first != other
    page.fill("#prompt", "A" * 200)
    page.wait_for_selector("#error:visible")
    assert "exceed" in page.locator("#error").text_content()
