"""The program `lit_gpt convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_gpt.console import note
from lit_gpt.options import make_parser

DESCRIPTION = """Convert checkpoints from and to other projects. The source's kind is recognised by what it holds:
a Hugging Face folder or id (GPT-2, Llama 3, Qwen2, Qwen3, SmolLM2), nanoGPT's ckpt.pt or its folder, a .pth of "LLMs
from scratch", the transformer book's model.ckpt, or a checkpoint of lit_gpt."""


def main(argv: list[str]) -> int:
    """Convert; prints the path that was written."""
    parser = make_parser("convert", DESCRIPTION)
    parser.add_argument("source", type=str, help="a file, a folder, or a Hugging Face id such as openai-community/gpt2")
    parser.add_argument("output", type=str, help="the .ckpt to write, or the folder with --to hf")
    parser.add_argument("--to", type=Literal["lit_gpt", "hf"], default="lit_gpt", help="the format to write")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16", "float64", None],
        default=None,
        help="dtype of the weights; the source's if left out",
    )
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="in place of the source's: a name such as gpt2, a saved tokenizer, or nanoGPT's meta.pkl",
    )
    parser.add_argument(
        "--n_head", type=int | None, default=None, help='number of heads, which a .pth of "LLMs from scratch" lacks'
    )
    options = parser.parse_args(argv)

    from lit_gpt.convert.recognise import open_source
    from lit_gpt.convert.write import check_absent, write_hf, write_lit_gpt

    output = Path(options.output).expanduser()
    check_absent(output)
    heads = "lit_gpt convert --n_head N"
    source = open_source(options.source, options.tokenizer, options.n_head, heads).to(options.dtype)
    parameters = sum(stored.nbytes // stored.dtype.itemsize for stored in source.weights.values())
    note(f"{source.kind}: {parameters:,} parameters")
    (write_hf if options.to == "hf" else write_lit_gpt)(source, output)
    print(output)
    return 0
