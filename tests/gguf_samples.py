"""What the tests of GGUF share: tiny random models of every shape that it has, and tokenizers of every kind."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import models
import torch

from lit_gpt.checkpoint.format import save_model
from lit_gpt.convert.gguf_tokenizer import PRE_TOKENIZERS
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer

LLAMA: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "n_kv_head": 2,
    "n_embd": 64,
    "intermediate_size": 96,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied, without biases": {
        "tie_embeddings": False,
        "intermediate_size": 64,
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
    },
    "llama": LLAMA | {"dropout": 0.1, "init_std": 0.013},
    "llama 3.1": LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING, "norm_eps": 1e-6},
    "llama linear": LLAMA
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "qkv_bias": True, "proj_bias": True, "mlp_bias": True},
    "qwen2": LLAMA | {"qkv_bias": True, "n_kv_head": None},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 24, "tie_embeddings": True, "rope_theta": 1e6},
}
ARCHITECTURE = {name: name.split()[0] for name in SHAPES}
TEXT = (
    "The quick brown fox doesn't jump over 12345 lazy dogs; it's 2026 and they've 3.14 reasons.\n\n"
    "def f(x):\n    return [x ** 2 for x in range(100)]\n\n\tif x == y:\n        pass\n"
    "naïve café — Ελληνικά, Русский язык, 你好世界，日本語のテキスト 한국어 العربية हिन्दी 👩‍👩‍👧 🇩🇪\n"
    "DON'T WON'T I'LL you'll WE'RE aaaa aaaaaaa     spaces   \t tabs \r\n ends 1 22 333 4444\n"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def tokenizer(kind: str) -> Tokenizer:
    """ "byte", "ascii char", "char", "bpe:400", or merges of "bpe:400" with the pattern of a pre-tokenizer."""
    if kind == "byte":
        return get_tokenizer("byte")
    if kind == "char":
        return train_tokenizer("char", [TEXT])
    if kind == "two-byte char":
        return train_tokenizer("char", ["naïve café Ελληνικά, Русский"])
    merges = train_tokenizer("bpe:400", [TEXT] * 4)
    if kind == "bpe:400":
        return merges
    specials = {name: merges.eot_id + n for n, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    return Tokenizer.build(
        f"of {kind}",
        PRE_TOKENIZERS[kind](),
        merges.ranks,
        specials,
        normalization="NFC" if kind == "qwen2" else None,
        bos_id=specials["<|im_start|>"] if kind == "llama-bpe" else None,
        chat_template=CHATML,
    )


def sample(shape: str, kind: str | None = "bpe:400", **changes: Any) -> tuple[GPT, Tokenizer | None]:
    """A random model of that shape in float32, and the tokenizer for it."""
    made = None if kind is None else tokenizer(kind)
    vocab_size = 300 if made is None else made.n_vocab
    config = {"vocab_size": vocab_size, "block_size": 48, **SHAPES[shape], **changes}
    return models.tiny_gpt(dtype=torch.float32, std=0.2, **config), made


def sample_source(folder: Path, shape: str, kind: str | None = "bpe:400", **changes: Any) -> SourceCheckpoint:
    """The same as an open checkpoint of ours."""
    model, made = sample(shape, kind, **changes)
    save_model(folder / "sample.ckpt", model, made)
    return open_source(str(folder / "sample.ckpt"))


@cache
def random_texts(count: int, seed: int = 0) -> tuple[str, ...]:
    """Texts of all scripts, with the spaces, digits and contractions that tell pre-tokenizers apart."""
    draw = random.Random(seed)
    pools = [range(0x20, 0x7F), range(0x80, 0x600), range(0x900, 0xE00), range(0x2000, 0x2070), range(0x3040, 0x30FF)]
    pools += [range(0x4E00, 0x9FA5), range(0xAC00, 0xD7A3), range(0x1F300, 0x1F64F)]
    pieces = [
        "'s",
        "'LL",
        "'re",
        " ",
        "  ",
        "\n",
        "\r\n",
        " \n ",
        "\t",
        "1",
        "22",
        "4444",
        "the",
        " fox",
        "aaaa",
        "\x85",
    ]

    def text() -> str:
        parts = [
            draw.choice(pieces) if draw.random() < 0.4 else chr(draw.choice(draw.choice(pools)))
            for _ in range(draw.randrange(1, 40))
        ]
        return "".join(parts)

    return tuple(text() for _ in range(count))
