"""Files of tokenizers with byte fallback in the shapes that families have, trained here by the `tokenizers` library."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\u2581"
CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; it's 2026 and they've 3.14 reasons.\n\n",
    "def f(x):\n    return [x ** 2 for x in range(100)]\n\n\tif x == y:\n        pass\n",
    "naïve café — Ελληνικά, Русский язык, 你好世界，日本語のテキスト 한국어 العربية हिन्दी 👩‍👩‍👧 🇩🇪\n",
] * 4
SHAPES = ["llama", "metaspace", "gemma"]


@cache
def _file(shape: str) -> str:
    tokenizer = HubTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if shape == "llama":  # Llama 2, TinyLlama, Mistral 0.1, Phi-3
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    elif shape == "metaspace":  # the same as newer conversions write it
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", False)
        steps.append(decoders.Strip(" ", 1, 0))
    else:  # Gemma: nothing in front, and runs of line ends as tokens of their own
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", SPACE) for text in CORPUS], trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    tokenizer = HubTokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
    if shape == "gemma":
        tokenizer.add_tokens(["\n\n\n", "<table>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer.to_str()


def byte_fallback_file(shape: str) -> dict[str, Any]:
    """The content of a new `tokenizer.json` of this shape."""
    return json.loads(_file(shape))
