"""The program `lit_gpt convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_gpt.console import note
from lit_gpt.convert.publish import add_arguments as add_publishing_arguments
from lit_gpt.convert.publish import publication_of, publish
from lit_gpt.options import CommandParser, make_parser, options_first

DESCRIPTION = """Convert checkpoints from and to other projects. The source's kind is recognised by what it holds:
a Hugging Face folder or id (GPT-2, Llama 3, Qwen2, Qwen3, SmolLM2), nanoGPT's ckpt.pt or its folder, a .pth of "LLMs
from scratch", the transformer book's model.ckpt, or a checkpoint of lit_gpt."""


def main(argv: list[str]) -> int:
    """Convert; prints the path that was written, and the address of what was uploaded."""
    parser = _parser()
    options = parser.parse_args(options_first(parser, argv))
    publication = publication_of(options)

    from lit_gpt.convert.recognise import open_source
    from lit_gpt.convert.write import check_absent, write_lit_gpt

    output = None if options.output is None else Path(options.output).expanduser()
    if output is not None:
        check_absent(output)
    if publication is not None:
        publication.check_access()
    heads = "lit_gpt convert --n_head N"
    source = open_source(options.source, options.tokenizer, options.n_head, heads).to(options.dtype)
    parameters = sum(stored.nbytes // stored.dtype.itemsize for stored in source.weights.values())
    note(f"{source.kind}: {parameters:,} parameters")
    if publication is not None:
        for line in publish(source, output, publication):
            print(line)
    elif output is not None:
        write_lit_gpt(source, output)
        print(output)
    return 0


def _parser() -> CommandParser:
    parser = make_parser("convert", DESCRIPTION)
    parser.add_argument("source", type=str, help="a file, a folder, or a Hugging Face id such as openai-community/gpt2")
    parser.add_argument("output", type=str | None, nargs="?", help="the .ckpt to write, or the folder with --to hf")
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
    add_publishing_arguments(parser)
    return parser
