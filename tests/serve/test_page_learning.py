"""The page's parts for learning in headless Chromium: the loop, ids, the tally, the training text, the questions."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import ROOT
from models import tiny_gpt
from pages import ascii_model, byte_tokenizer, flip, prompt
from serving import CHROMIUM, CONTEXT, Serving, serving

from lit_gpt.data.prepare import prepare
from lit_gpt.serve.training_text import open_training_text
from lit_gpt.tokenizer.tokenizer import get_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"{CHROMIUM} is not there")]

Visit = Callable[..., Any]
PAGE = ROOT / "lit_gpt/serve/page"
DOCUMENTS = ["the cat sat on the mat and the cow came", "the car is the best 车 of the city", "no article here"]
BEGINNINGS = ("the c", "no article")
PARTS = ["text", "tokens", "model", "distribution", "draw", "append"]
QUESTIONS = ["temperature", "seed", "topK", "topP", "memory"]
EXPECT = playwright.expect


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server with training text and with sample prompts, of a model of 257 tokens: not all of them are listed."""
    folder = tmp_path_factory.mktemp("learner")
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_text(text, "utf-8")
    prepare([str(folder / f"{number}.txt") for number in range(3)], folder / "shards", "byte", val_split="hash:0")
    text = open_training_text(str(folder / "shards"), get_tokenizer("byte"))
    with serving(training_text=text, sample_prompts=BEGINNINGS) as running:
        yield running


def next_token(server: Serving, text: str, **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/next_token", {"prompt": text, "limit": 200, "seed": 1, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def percent(page: Any, share: float) -> str:
    """A share as the page writes it."""
    return page.evaluate("async (p) => (await import('/page/i18n.js')).percent(p)", share)


# --- what the page opens with


def test_it_opens_with_a_beginning_that_the_checkpoint_has_kept(learner: Serving, visit: Visit) -> None:
    page = visit(learner)
    assert page.input_value("#prompt") == page.locator(".given").first.text_content() == "the c"
    page.click("#language")
    page.click("#language")
    assert page.input_value("#prompt") == "the c"  # it is the model's, whatever the page speaks
    for following in ("no article", "the c"):
        page.click("#beginning")
        EXPECT(page.locator(".given").first).to_have_text(following)


def test_without_one_it_opens_with_a_text_for_any_model(server: Serving, visit: Visit) -> None:
    page = visit(server)
    assert page.input_value("#prompt") == "The"
    page.click("#language")
    assert page.input_value("#prompt") == "今天" and not page.locator("#beginning").is_visible()
    assert not page.locator(".training").is_visible()  # nor is there training text


# --- the tally


def uniforms(seed: int) -> Iterator[float]:
    """xoshiro128**, written anew from its authors' C; its state is seeded as draws.js says."""
    mask = 0xFFFFFFFF

    def rotated(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & mask

    state, counter = [], seed
    for _ in range(4):
        counter = (counter + 0x9E3779B9) & mask
        z = (counter ^ counter >> 16) * 0x85EBCA6B & mask
        z = (z ^ z >> 13) * 0xC2B2AE35 & mask
        state.append(z ^ z >> 16)

    def bits() -> int:
        result = rotated(state[1] * 5 & mask, 7) * 9 & mask
        shifted = state[1] << 9 & mask
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= shifted
        state[3] = rotated(state[3], 11)
        return result

    while True:
        high = bits() >> 5
        yield (high * 2**26 + (bits() >> 6)) / 2**53


def drawn_here(answer: dict[str, Any], seed: int, times: int) -> dict[int | None, int]:
    """How often each id is drawn; None stands for those that are not listed."""
    owners = sorted((each["start"], each["end"], each["id"]) for each in answer["candidates"] if each["probability"])
    counts: dict[int | None, int] = {}
    for u, _ in zip(uniforms(seed), range(times)):
        before = bisect_right(owners, (u, 2.0, 0))
        _, end, owner = owners[before - 1] if before else (0.0, 0.0, 0)
        found = owner if u < end else None
        counts[found] = counts.get(found, 0) + 1
    return counts


def shown_counts(page: Any) -> list[int]:
    return [int(re.sub(r"\D", "", text)) for text in page.locator(".bar .count-drawn").all_text_contents()]


def points_apart(page: Any) -> float:
    return float(re.search(r"([\d.]+) percentage points", page.locator(".largest").text_content())[1])


def test_the_tally_is_drawn_from_the_exact_distribution(learner: Serving, visit: Visit) -> None:
    """Also from the 57 tokens that are not listed; and the more draws, the smaller the largest difference."""
    page = visit(learner)
    page.fill("#temperature", "1.5")
    answer = next_token(learner, "the c", temperature=1.5)
    assert answer["kept"] == 257 and len(answer["candidates"]) <= 201 and answer["rest_probability"] > 0.001
    EXPECT(page.locator(".bar .strong").first).to_have_text(percent(page, answer["candidates"][0]["probability"]))
    for button, total in ((".draw-few", 100), (".draw-many", 10_100)):
        page.click(button)
        counts = drawn_here(answer, 1, total)
        listed = [counts.get(each["id"], 0) for each in answer["candidates"][:12]]
        assert shown_counts(page) == listed
        others = page.locator(".bar-others .count-drawn").text_content()
        assert int(re.sub(r"\D", "", others)) == total - sum(listed)
        shares = {each["id"]: each["probability"] for each in answer["candidates"]}
        shares[None] = answer["rest_probability"]
        largest = max(abs(counts.get(one, 0) / total - share) for one, share in shares.items())
        assert points_apart(page) == pytest.approx(100 * largest, rel=0.01)
        assert page.locator(".largest").text_content().startswith(f"{total:,} draws")
        assert page.locator(".bar .times").count() == sum(count > 0 for count in listed)
        if total == 100:
            few = points_apart(page)
    assert points_apart(page) < few / 3  # 1/√100 of it on average would be a tenth
    assert counts[None] > 0
    assert "10,100" in page.locator(".curve").get_attribute("aria-label")
    assert page.locator(".curve .difference").get_attribute("points").count(",") > 40
    assert "drawn" in page.locator(".bar").first.get_attribute("aria-label")
    page.click(".clear")
    check_what_a_tally_belongs_to(page)


def check_what_a_tally_belongs_to(page: Any) -> None:
    """Its distribution and its random numbers: with others it starts anew."""
    page.click(".draw-few")
    first = shown_counts(page)
    page.click(".clear")
    assert shown_counts(page) == [] and not page.locator(".largest").is_visible()
    page.click(".draw-few")
    assert shown_counts(page) == first  # the seed's numbers are the same
    page.check(".unseeded")
    assert shown_counts(page) == []
    page.click(".draw-many")
    once = shown_counts(page)
    page.click(".clear")
    page.click(".draw-many")
    assert shown_counts(page) != once
    page.fill("#top-k", "0")  # one token is left
    EXPECT(page.locator(".segment")).to_have_count(1)
    assert shown_counts(page) == []  # what was drawn before does not count here
    page.click(".draw-few")
    assert sorted(shown_counts(page)) == [0] * 11 + [100] and points_apart(page) == 0


# --- the loop and the ids

WATCH = """() => {
  const loop = document.getElementById('loop');
  window.were = [];
  const watch = (records) => records.forEach((record) => window.were.push(record.oldValue));
  new MutationObserver(watch).observe(loop, { attributeFilter: ['data-at'], attributeOldValue: true });
}"""
LIT = "() => [...window.were, document.getElementById('loop').dataset.at ?? null].slice(1)"


def test_each_token_of_a_stream_lights_the_parts_of_the_loop(start: Callable[..., Serving], visit: Visit) -> None:
    slow = start(model=ascii_model(3), tokenizer=byte_tokenizer(), seconds=0.05)
    page = visit(slow)
    page.click("#tab-write")
    page.fill("#length", "5")
    page.evaluate(WATCH)
    page.click("#go")
    page.wait_for_selector("[data-part=model].lit")  # while the answer is awaited
    page.wait_for_selector("#go:not([disabled])")
    lit = page.evaluate(LIT)
    while lit[-1] == "":  # nothing is at work any more
        lit.pop()
    assert page.locator("#sheet .token").count() == 5 and lit == PARTS * 5
    assert page.locator("#loop .lit").count() == 0
    assert page.locator("[data-part=tokens] span").text_content() == "7 read"  # "The", and four of the five
    last = page.locator("#sheet .token").last.text_content()
    assert page.locator("[data-part=append] span").text_content() == "+ " + last.replace(" ", "␣")


def test_flipping_lights_the_loop_too_and_the_drawing_in_the_guides_is_that_of_the_page(
    learner: Serving, visit: Visit
) -> None:
    page = visit(learner)
    assert page.locator("#loop").get_attribute("data-at") == "distribution"
    page.evaluate(WATCH)
    flip(page, 2)
    assert page.evaluate(LIT) == [*["draw", "append", "text", "tokens", "model", "distribution"] * 2]
    assert page.locator("[data-part=tokens] span").text_content() == "7 read"
    drawing = (ROOT / "docs/loop.svg").read_text("utf-8")
    for kind in ("part", "part-zh"):
        drawn = re.findall(rf'class="{kind}"[^>]*>([^<]+)<', drawing)
        assert drawn == page.locator("#loop li b").all_text_contents() and len(drawn) == 6
        page.click("#language")


AFTER = "(node, part) => getComputedStyle(node, part).content"


def test_every_token_has_its_id(learner: Serving, visit: Visit) -> None:
    page = visit(learner)
    flip(page, 2)
    path = learner.complete(prompt="the c", max_tokens=2, seed=1, return_token_ids=True)["choices"][0]["token_ids"]
    given, written = page.locator(".piece"), page.locator(".lane .token")
    for tokens, expected in ((given, list(b"the c")), (written, path)):
        assert [int(each.get_attribute("data-id")) for each in tokens.all()] == expected
    assert f"id {path[0]}" in written.first.get_attribute("aria-label")
    given.nth(1).hover()
    assert page.locator("#card").text_content() == "hid 104"
    written.first.hover()
    assert f"id {path[0]}" in page.locator("#card").text_content()
    shown = [(given.nth(1), "::before"), (given.nth(1), "::after"), (written.first, "::before"),
             (page.locator(".bar .name").first, "::after")]  # fmt: skip
    assert {each.evaluate(AFTER, part) for each, part in shown} == {"none"}
    page.click("#ids")
    assert page.get_attribute("#ids", "aria-pressed") == "true"
    assert "none" not in {each.evaluate(AFTER, part) for each, part in shown}
    assert "→" in written.first.evaluate(AFTER, "::before") and given.first.evaluate(AFTER, "::before") == "none"
    page.reload()  # it is remembered
    page.wait_for_selector(".piece")
    assert given.nth(1).evaluate(AFTER, "::after") != "none"
    page.click("#tab-write")
    page.fill("#length", "3")
    page.fill("#temperature", "0")  # a sampled end of text would end it early
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")
    assert page.locator("#sheet .piece").count() == 5 and page.locator("#sheet .token[data-id]").count() == 3


# --- the training text


def test_what_came_next_in_the_training_text_stands_beside_the_model(learner: Serving, visit: Visit) -> None:
    page = visit(learner)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "continuations" in request.url else None)
    flip(page)
    assert asked == []  # it is read when it is opened
    page.click("#back")
    page.wait_for_selector("#flip:not([disabled])")
    page.click(".training summary")
    EXPECT(page.locator(".found")).to_contain_text(
        "“the c” occurs 4× in 92 tokens of training text (its length in tokens: 5)"
    )
    answer = next_token(learner, "the c")
    raw = {each["text"]: each["raw"] for each in answer["candidates"]}
    rows = {row.locator("th").text_content(): row.locator("td").all_text_contents()
            for row in page.locator(".followed tbody tr").all()}  # fmt: skip
    assert {name: cells[0] for name, cells in rows.items() if not cells[0].startswith("0×")} == {
        "a": "2× 50%", "o": "1× 25%", "i": "1× 25%"
    }  # fmt: skip
    likeliest = [each["text"] for each in answer["candidates"][:4] if each["text"].isascii() and each["text"].isalnum()]
    assert set(likeliest) <= set(rows)
    assert rows["a"][1] == ("" if "a" in raw else "≤ ") + percent(page, raw.get("a", min(raw.values())))
    excerpts = page.locator(".excerpts li")
    assert excerpts.count() == 3 and "train_000000.bin" in excerpts.first.text_content()
    assert excerpts.locator("b").all_text_contents() == ["the c"] * 3
    assert all(any(shown in text for text in DOCUMENTS) for shown in excerpts.locator("q").all_text_contents())
    prompt(page, "no article Q")
    EXPECT(page.locator(".found")).to_contain_text("Not even the last token")
    assert not page.locator(".followed").is_visible() and page.locator(".excerpts li").count() == 0
    page.click("#language")
    assert "一次也没有出现" in page.locator(".found").text_content()


# --- the questions


def guess(page: Any, name: str, option: str) -> str:
    """Choose an option, try it, and read what the page says."""
    question = page.locator(f"[data-question={name}]")
    question.locator(f"input[value={option}]").check()
    question.locator(".try").click()
    question.locator(".verdict").wait_for()
    return question.locator(".verdict").get_attribute("class").split()[1]


def right_answers(server: Serving, text: str) -> dict[str, str]:
    """What is true of this model and this text, asked of the server in other words than the page's."""
    kept = next_token(server, text, top_p=0.5)["kept"]
    masses = sorted((each["raw"] for each in next_token(server, text)["candidates"]), reverse=True)
    assert sum(masses[: kept - 1]) < 0.5 <= sum(masses[:kept]) + 1e-9
    twice = [server.complete(prompt=text, max_tokens=12, seed=1)["choices"][0]["text"] for _ in range(2)]
    return {
        "temperature": "cold",
        "seed": "same" if twice[0] == twice[1] else "other",
        "topK": "three",
        "topP": "upTo1" if kept == 1 else "upTo5" if kept <= 5 else "upTo20" if kept <= 20 else "more",
        "memory": "changes",
    }


def test_a_guess_is_judged_by_what_the_model_does(learner: Serving, visit: Visit) -> None:
    page = visit(learner)
    page.fill("#temperature", "0")  # the sliders do not matter here
    right = right_answers(learner, "the c")
    assert [each.get_attribute("data-question") for each in page.locator(".questions > li").all()] == QUESTIONS
    for name in QUESTIONS:
        options = page.locator(f"[data-question={name}] input").evaluate_all("all => all.map(one => one.value)")
        assert page.locator(f"[data-question={name}] .try").is_disabled()
        for option in [*(one for one in options if one != right[name]), right[name]]:
            assert guess(page, name, option) == ("quizRight" if option == right[name] else "quizWrong")
    assert page.locator(".score").text_content() == "5 of 5 guesses were right."
    page.click("#language")
    assert page.locator(".score").text_content() == "猜了 5 个，对了 5 个。"
    assert all(text.startswith("猜对了") for text in page.locator(".verdict").all_text_contents())
    shown = page.locator("[data-question=memory] .quiz-result").text_content().replace("token", "")
    assert not re.search("[A-Za-z]{4,}", shown)


def test_of_a_model_that_knows_nothing_other_answers_are_right(start: Callable[..., Serving], visit: Visit) -> None:
    """All tokens are equally likely, whatever is read: nothing is written down as true of every model."""
    flat = tiny_gpt(std=None, block_size=CONTEXT)
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    page = visit(start(model=flat))
    assert guess(page, "temperature", "cold") == "quizNeither"
    assert guess(page, "topP", "more") == "quizRight" and guess(page, "topP", "upTo1") == "quizWrong"
    assert guess(page, "memory", "stays") == "quizRight" and guess(page, "memory", "changes") == "quizWrong"


def test_a_failed_try_is_said_and_can_be_repeated(learner: Serving, visit: Visit) -> None:
    page = visit(learner, quiet=False)
    page.route("**/v1/completions", lambda route: route.fulfill(status=503, json={"error": {"message": "busy now"}}))
    question = page.locator("[data-question=seed]")
    question.locator("input").first.check()
    question.locator(".try").click()
    EXPECT(page.locator("#error")).to_have_text("busy now")
    assert question.locator(".verdict").count() == 0 and question.locator(".try").is_enabled()


# --- all of it


def test_by_keyboard_and_with_names(learner: Serving, visit: Visit) -> None:
    page = visit(learner)
    page.focus("[data-question=topK] input >> nth=0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("[data-question=topK] .verdict.quizRight").wait_for()
    assert "3 of 257" in page.locator("#status").text_content()  # it is read out
    page.focus(".draw-few")
    page.keyboard.press("Enter")
    assert page.locator("#status").text_content().startswith("100 draws")
    page.focus(".training summary")
    page.keyboard.press("Enter")
    EXPECT(page.locator("#status")).to_contain_text("occurs 4×")
    nameless = page.locator("button:visible, input:visible, textarea:visible, fieldset, summary").evaluate_all(
        "all => all.filter(one => !(one.textContent.trim() || one.labels?.length || one.ariaLabel)).length"
    )
    assert nameless == 0


def test_a_phone_needs_no_horizontal_scrolling_in_either_language(learner: Serving, visit: Visit) -> None:
    size = {"width": 360, "height": 740}
    page = visit(learner, locale="zh-CN", viewport=size, is_mobile=True, has_touch=True)
    page.click("#ids")
    page.click(".training summary")
    page.wait_for_selector(".excerpts li")
    page.click(".draw-many")
    for name in QUESTIONS:
        guess(page, name, page.locator(f"[data-question={name}] input").first.get_attribute("value"))
    assert page.locator("[data-t]:visible").evaluate_all("all => all.every(node => node.textContent.trim())")
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    page.click("#compare")
    page.wait_for_selector(".lane:nth-child(2) .bar")
    for _ in range(2):
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        page.click("#language")


def test_both_languages_say_the_same_with_the_same_values(learner: Serving, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"{learner.url}/health")  # of the same origin, and nothing to draw
    words = page.evaluate("async () => (await import('/page/words_learning.js')).LEARNING")
    values = [{key: sorted(re.findall(r"{(\w+)}", text)) for key, text in words[name].items()} for name in ("en", "zh")]
    page.close()
    assert values[0] == values[1] and len(values[0]) > 60


def test_no_file_of_the_page_is_over_400_lines() -> None:
    long = [path.name for path in PAGE.iterdir() if len(Path(path).read_text("utf-8").splitlines()) > 400]
    assert long == []
