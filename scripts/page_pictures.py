"""The pictures of the page in docs/serving.md, taken in headless Chromium from a server that runs already.

lit_gpt serve --ckpt_path best --data_path data/stdlib --port 8000
python scripts/page_pictures.py --url http://127.0.0.1:8000 --only page_next_token page_questions page_write
python scripts/page_pictures.py --url http://127.0.0.1:8000 --prompt "    def" --only page_tally page_training_text
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from lit_gpt.files.atomic import atomic_write

COLOURS = 256
"""Of a picture's palette: the page has few, and a file is a third as large."""
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu"]


def flip(page: Any, times: int) -> None:
    """Press Flip so many times."""
    for _ in range(times):
        page.wait_for_selector("#flip:not([disabled])")
        page.click("#flip")
    page.wait_for_selector("#flip:not([disabled])")


def next_token(page: Any) -> None:
    """A draw with some tokens cut, and the loop."""
    page.fill("#temperature", "0.7")
    page.fill("#top-p", "0.8")
    flip(page, 8)
    page.locator(".lane .token").nth(3).click()
    page.wait_for_selector(".coin:not([hidden])")
    page.mouse.move(0, 0)


def tally(page: Any) -> None:
    """A hundred draws and then ten thousand, and the ids."""
    page.click("#ids")
    page.fill("#temperature", "0.7")
    flip(page, 4)
    page.click(".draw-few")
    page.click(".draw-many")
    page.mouse.move(0, 0)


def training(page: Any) -> None:
    """What came next in the training text."""
    page.click(".training summary")
    page.wait_for_selector(".excerpts li")


def questions(page: Any) -> None:
    """Three questions that were tried."""
    for name, option in (("temperature", "cold"), ("seed", "same"), ("topP", "upTo1")):
        page.check(f"[data-question={name}] input[value={option}]")
        page.click(f"[data-question={name}] .try")
        page.wait_for_selector(f"[data-question={name}] .verdict")


def compare(page: Any) -> None:
    """Two seeds."""
    page.click("#compare")
    page.wait_for_selector(".lane:nth-child(2) .bar")
    flip(page, 8)


def write(page: Any) -> None:
    """A text, coloured, with a token's card."""
    page.click("#tab-write")
    page.fill("#length", "100")
    page.fill("#temperature", "0.7")
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")
    page.locator("#sheet .token").nth(12).hover()


def phone(page: Any) -> None:
    """The loop and a text, from the field for the text on."""
    page.fill("#temperature", "0.7")
    flip(page, 6)
    page.locator("#start").evaluate("node => node.scrollIntoView()")


Shot = tuple[str, Callable[[Any], None], tuple[str, str] | None, dict[str, Any]]
SHOTS: list[Shot] = [
    ("page_next_token", next_token, ("#main", ".rest"), {}),
    ("page_tally", tally, (".lane", ".tally"), {}),
    ("page_training_text", training, (".training", ".training"), {}),
    ("page_questions", questions, ("#quiz", "#quiz"), {}),
    ("page_compare_zh", compare, ("#loop", ".lane"), {"locale": "zh-CN", "color_scheme": "dark"}),
    ("page_write", write, ("#main", ".panels"), {}),
    ("page_phone", phone, None, {"viewport": {"width": 390, "height": 780}, "is_mobile": True}),
]
"""File, what is done, the first and the last element that are shown (none: the window), and the browser's options."""
MARGIN = 12
"""Around what is shown, in pixels."""


def shoot(browser: Any, url: str, prompt: str | None, shot: Shot) -> bytes:
    """One picture as PNG."""
    _, prepare, shown, options = shot
    defaults = {"locale": "en-US", "reduced_motion": "reduce", "viewport": {"width": 1180, "height": 860}}
    context = browser.new_context(**{**defaults, **options})
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".bar")
    if prompt is not None:
        page.fill("#prompt", prompt)
        page.wait_for_timeout(500)  # the page waits for the end of the typing
    prepare(page)
    data: bytes = page.screenshot() if shown is None else page.screenshot(clip=_between(page, *shown), full_page=True)
    context.close()
    return data


def _between(page: Any, first: str, last: str) -> dict[str, float]:
    """The rectangle from the top of one element to the bottom of another, as wide as the first."""
    start, end = (
        page.locator(each).first.evaluate(
            "node => { const box = node.getBoundingClientRect();"
            " return { x: box.left, width: box.width, top: box.top + scrollY, bottom: box.bottom + scrollY }; }"
        )
        for each in (first, last)
    )
    top, left = max(0, start["top"] - MARGIN), max(0, start["x"] - MARGIN)
    return {"x": left, "y": top, "width": start["width"] + 2 * MARGIN, "height": end["bottom"] - top + MARGIN}


def main() -> None:
    """Take all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of a server, better one with --data_path")
    parser.add_argument("--prompt", help="what to begin with; by default what the page opens with")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--only", nargs="*", help="names of pictures")
    options = parser.parse_args()
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for shot in SHOTS:
            if options.only and shot[0] not in options.only:
                continue
            image = Image.open(io.BytesIO(shoot(browser, options.url, options.prompt, shot)))
            path = options.output / f"{shot[0]}.png"
            with atomic_write(path) as file:
                image.convert("RGB").quantize(COLOURS).save(file, format="PNG", optimize=True)
            print(f"{path}: {path.stat().st_size:,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
