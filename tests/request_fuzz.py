"""Requests to the server that are often right, or else wrong in a few ways; for a model with more rows than ids."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

ROWS = 320
"""Of the model; its tokenizer has 259 ids, so that every check of an id against the wrong number shows."""
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/next_token", "/tokenize", "/detokenize")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if 'loop' in m['content'] %}{{ 1 // 0 }}{% endif %}{% endfor %}"

ids = st.lists(st.integers(0, 258) | st.integers(-2, ROWS + 3), max_size=9)
texts = st.text(max_size=12) | st.sampled_from(["", " " * 3000, "<|im_start|>", "\ud800", "loop", "a" * 96])
prompts = texts | ids | st.lists(texts, max_size=3) | st.lists(ids, max_size=3)
numbers = st.sampled_from([-1, 0, 1e-300, 0.5, 1, 1.3, 2, 100, 1e308, 2**63, None, True, "x", [1], {}])
small = st.sampled_from([None, -1, 0, 1, 2, 20, 21, True])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": prompts, "tokens": ids, "generated": ids, "max_tokens": st.integers(0, 12) | numbers, "n": small,
    "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "robot"]), "content": texts})),
    "echo": st.booleans(), "logprobs": small, "stream": st.booleans(), "seed": numbers, "limit": numbers,
    "temperature": numbers, "top_k": numbers, "top_p": numbers, "min_p": numbers,
    "repetition_penalty": numbers, "frequency_penalty": numbers, "presence_penalty": numbers,
    "stop": texts | st.lists(texts, max_size=3), "stop_token_ids": ids, "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, ROWS).map(str), st.sampled_from([-100, -1, 0, 100]), max_size=3),
    "min_tokens": small, "return_token_ids": st.booleans(), "nonsense": numbers,
}  # fmt: skip
WANTED = {
    "/v1/completions": ["prompt", "max_tokens"],
    "/v1/chat/completions": ["messages", "max_tokens"],
    "/v1/next_token": ["prompt"],
    "/tokenize": ["prompt"],
    "/detokenize": ["tokens"],
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body that is often right, or else wrong in a few ways."""
    path = draw(st.sampled_from(PATHS))
    others = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4))
    body = json.dumps({name: draw(FIELDS[name]) for name in [*WANTED[path], *others]}).encode()
    damage = draw(st.sampled_from(["none"] * 8 + ["cut", "byte"]))
    if damage == "cut":
        return path, body[: len(body) // 2]
    return path, body.replace(b"1", b"\xff") if damage == "byte" else body
