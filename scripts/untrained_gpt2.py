"""The untrained model of chapter 4 of "LLMs from scratch", with its seed: a .pth for `--init_from`, and its demo.

python scripts/untrained_gpt2.py --output untrained.pth
lit_gpt predict --init_from untrained.pth --start "Hello, I am" --max_new_tokens 6 --temperature 0 --show_ids

The chapter sets `torch.manual_seed(123)` and leaves the numbers to PyTorch's own initialisation, layer by layer as they
are made. The same layers made in the same order have the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_gpt.convert.recognise import load_source
from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

PROMPT = (15496, 11, 314, 716)
"""What GPT-2's tokenizer makes of "Hello, I am"."""


def random_layers(config: GPTConfig) -> Iterator[tuple[str, nn.Module]]:
    """The layers that draw random numbers, by the chapter's names and in its order."""
    width, hidden = config.n_embd, 4 * config.n_embd
    yield "tok_emb", nn.Embedding(config.vocab_size, width)
    yield "pos_emb", nn.Embedding(config.block_size, width)
    for block in (f"trf_blocks.{number}" for number in range(config.n_layer)):
        for name in ("W_query", "W_key", "W_value"):
            yield f"{block}.att.{name}", nn.Linear(width, width, bias=False)
        yield f"{block}.att.out_proj", nn.Linear(width, width)
        yield f"{block}.ff.layers.0", nn.Linear(width, hidden)
        yield f"{block}.ff.layers.2", nn.Linear(hidden, width)
    yield "out_head", nn.Linear(width, config.vocab_size, bias=False)


def untrained_weights(config: GPTConfig, seed: int = 123) -> dict[str, Tensor]:
    """The chapter's state dict before any training; its norms begin with a scale of 1 and a shift of 0."""
    torch.manual_seed(seed)
    state = {
        f"{name}.{kind}": tensor for name, layer in random_layers(config) for kind, tensor in layer.state_dict().items()
    }
    norms = [f"trf_blocks.{block}.norm{number}" for block in range(config.n_layer) for number in (1, 2)]
    for norm in (*norms, "final_norm"):
        state[f"{norm}.scale"], state[f"{norm}.shift"] = torch.ones(config.n_embd), torch.zeros(config.n_embd)
    return state


@torch.no_grad()
def generate_text_simple(model: GPT, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """The chapter's loop: feed the ids, (B, T), append the likeliest next one, (B, T + 1), and again."""
    for _ in range(max_new_tokens):
        likeliest = model(idx[:, -context_size:]).logits[:, -1].argmax(-1, keepdim=True)
        idx = torch.cat((idx, likeliest), dim=1)
    return idx


def main() -> None:
    """Write the weights, then run the demo on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("untrained.pth"), help="650 MB are written to it")
    output = parser.parse_args().output
    with atomic_write(output) as file:
        torch.save(untrained_weights(GPTConfig.from_preset("llms-from-scratch-124m")), file)
    model, _ = load_source(str(output))
    idx = torch.tensor([PROMPT])
    print("input ", idx.tolist(), "shape", tuple(idx.shape))
    idx = generate_text_simple(model.eval(), idx, 6, model.config.block_size)
    print("output", idx.tolist(), "shape", tuple(idx.shape))


if __name__ == "__main__":
    main()
