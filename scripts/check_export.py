"""A checkpoint as GGUF in llama.cpp against ours: token ids, greedy continuations, loss. Exits with 1 if they differ.

python scripts/check_export.py CHECKPOINT --text validation.txt [--dtypes f32,q8_0,q4_0] [--prompts prompts.txt]

It needs llama-cpp-python, which is built from source: pip install llama-cpp-python. Each type is written to a temporary
folder and read by llama.cpp from there. Compared are the ids of 10,000 random strings of all scripts (what a user types
is never a special token); in f32 the 64 greedy tokens after each prompt; and the perplexity of the text, in windows of
the context: that of q8_0 may differ by 0.1 %, that of q4_0 by 3 %.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.convert.gguf_write import write_gguf
from lit_gpt.convert.recognise import open_source
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer

PROMPTS = [
    *("First Citizen:", "The ", "Once upon a time", "def main():", "In 1984, ", "Don't ", "\n\n", "What is 2 + 2?"),
    *(
        "你好",
        "从前有",
        "春天来了，",
        "人工智能是",
        "今天天气",
        "北京",
        "一二三四五",
        "Ελλάδα",
        "Привет",
        "こんにちは",
        "café",
        "👍🏽",
    ),
]
LARGEST_CHANGE = {"f32": 1e-3, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-3, "q4_0": 3e-2}
"""Of perplexity, against ours in float32, as a share of it."""
CONTINUATION = 64


def random_texts(count: int) -> Iterator[str]:
    """Strings of any characters, with spaces, digits, line ends and contractions among them."""
    draw = random.Random(0)
    pools = [range(0x20, 0x7F), range(0x80, 0x600), range(0x900, 0xE00), range(0x2000, 0x3100), range(0x4E00, 0x9FA5)]
    pools += [range(0xAC00, 0xD7A3), range(0x1F300, 0x1F64F)]
    pieces = ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "12", "4444", "the", " fox", "<|endoftext|>"]
    for _ in range(count):
        parts = (
            draw.choice(pieces) if draw.random() < 0.4 else chr(draw.choice(draw.choice(pools)))
            for _ in range(draw.randrange(1, 60))
        )
        yield "".join(parts)


def ids_there(model: Any, text: str) -> list[int]:
    """llama.cpp's ids of a text, without a BOS, and with the names of special tokens as plain text."""
    return list(model.tokenize(text.encode(), add_bos=False, special=False))


def different_ids(model: Any, tokenizer: Tokenizer, count: int) -> int:
    """How many of `count` random strings, in NFC if ours are, have other ids there; the first is shown."""
    differ = 0
    for text in random_texts(count):
        text = unicodedata.normalize("NFC", text) if tokenizer.normalization else text
        ours, theirs = tokenizer.encode(text), ids_there(model, text)
        if ours != theirs and not differ:
            print(f"  {text!r} is {ours} here, {theirs} there")
        differ += ours != theirs
    return differ


@torch.no_grad()
def greedy_here(model: GPT, ids: list[int], count: int) -> list[int]:
    """Our arg-max continuation, without a cache."""
    written: list[int] = []
    for _ in range(count):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def logits_there(model: Any, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits after each of `ids`, (T, V)."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy_there(model: Any, ids: list[int], count: int) -> list[int]:
    """llama.cpp's arg-max continuation, through its cache."""
    written: list[int] = []
    model.reset()
    model.eval(ids)
    for _ in range(count):
        written.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        if len(written) < count:
            model.eval(written[-1:])
    return written


def perplexities(model: GPT, there: Any, ids: list[int], windows: int) -> tuple[float, float]:
    """Of the first windows of a text, ours and llama.cpp's."""
    size, here, far, count = model.config.block_size, 0.0, 0.0, 0
    for start in range(0, min(len(ids) - 1, windows * size), size):
        part = ids[start : start + size + 1]
        targets = torch.tensor(part[1:])
        with torch.no_grad():
            logits = model(torch.tensor([part[:-1]])).logits[0]
        there_logits = torch.from_numpy(logits_there(there, part[:-1]))
        here += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
        far += float(torch.nn.functional.cross_entropy(there_logits.float(), targets, reduction="sum"))
        count += len(targets)
    return math.exp(here / count), math.exp(far / count)


def check(source: Any, dtype: str, text: str, prompts: list[str], options: argparse.Namespace) -> list[str]:
    """Write one type, load it in llama.cpp, compare; what is wrong, in words."""
    import llama_cpp

    model, tokenizer = source.load().float(), source.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(source, path, dtype)
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # its cache has 16 bits else
        there = llama_cpp.Llama(str(path), n_ctx=model.config.block_size, logits_all=True, verbose=False, **exact)
    print(f"{dtype}:")
    faults = []
    if differ := different_ids(there, tokenizer, options.strings):
        faults.append(f"{dtype}: {differ} of {options.strings} strings have other ids")
    if dtype == "f32":
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            count = min(CONTINUATION, model.config.block_size - len(ids))
            ours, theirs = greedy_here(model, ids, count), greedy_there(there, ids, count)
            if ours != theirs:
                same = next(n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                faults.append(f"{dtype}: after {prompt!r} the continuations part at token {same}")
    here, far = perplexities(model, there, tokenizer.encode(text), options.windows)
    print(f"  perplexity {here:.4f} here, {far:.4f} there ({100 * (far / here - 1):+.3f} %)")
    if abs(far / here - 1) > LARGEST_CHANGE[dtype]:
        faults.append(f"{dtype}: perplexity {far:.4f} there, {here:.4f} here")
    return faults


def main() -> int:
    """Compare each type; 0 if all is well, 1 if not, 2 for what cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True, type=Path, help="for the loss")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt on each line")
    parser.add_argument("--dtypes", default="f32,f16,bf16,q8_0,q4_0")
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--windows", type=int, default=40, help="of the context's size, for the loss")
    options = parser.parse_args()
    try:
        import llama_cpp
    except ImportError:
        print("llama-cpp-python is not installed: pip install llama-cpp-python", file=sys.stderr)
        return 2
    print(f"llama-cpp-python {llama_cpp.__version__}")
    source = open_source(options.checkpoint)
    if source.tokenizer is None:
        print(f"{options.checkpoint} has no tokenizer: nothing can be compared", file=sys.stderr)
        return 2
    prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS
    text = options.text.read_text()
    faults = [fault for dtype in options.dtypes.split(",") for fault in check(source, dtype, text, prompts, options)]
    print("\n".join(faults) or "all is the same")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
