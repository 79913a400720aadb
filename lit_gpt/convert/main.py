"""The program `lit_gpt convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from lit_gpt.console.messages import note
from lit_gpt.console.options import CommandParser, make_parser, options_first
from lit_gpt.convert.publish import add_arguments as add_publishing_arguments
from lit_gpt.convert.publish import publication_of, publish
from lit_gpt.errors import UserError, nearest

if TYPE_CHECKING:
    from lit_gpt.convert.source import SourceCheckpoint

DESCRIPTION = """Convert checkpoints from and to other projects. The source's kind is recognised by what it holds:
a Hugging Face folder or id (GPT-2, Llama 3, Qwen2, Qwen3, SmolLM2), a GGUF file of one of these, nanoGPT's ckpt.pt or
its folder, a .pth of "LLMs from scratch", the transformer book's model.ckpt, or a checkpoint of lit_gpt.
convert BASE ADAPTER OUTPUT makes one model of a base and an adapter of it, lit_gpt's or a folder of PEFT's."""


def main(argv: list[str]) -> int:
    """Convert; prints the path that was written, and the address of what was uploaded."""
    parser = _parser()
    options = parser.parse_args(options_first(parser, argv))
    _name_positions(options)
    to_gguf = _is_to_gguf(options)
    publication = publication_of(options)

    from lit_gpt.convert.recognise import open_adapter, open_source
    from lit_gpt.convert.write import check_absent, write_lit_gpt

    output = None if options.output is None else Path(options.output).expanduser()
    if output is not None:
        check_absent(output)
    if publication is not None:
        publication.check_access()
    write: Callable[[SourceCheckpoint, Path], None] = write_lit_gpt
    if to_gguf and output is not None:
        write = _gguf_writer(output, options.dtype, options.modelfile)
    if options.to == "peft":
        return _convert_to_peft(options, output)
    source = open_source(options.source, options.tokenizer, options.n_head, "lit_gpt convert --n_head N")
    if options.adapter is not None:
        from lit_gpt.convert.adapters import merged

        source = merged(source, open_adapter(options.adapter, source))
    parameters = sum(stored.nbytes // stored.dtype.itemsize for stored in source.weights.values())
    note(f"{source.kind}: {parameters:,} parameters")
    if not to_gguf:
        source = source.to(_TORCH_NAMES.get(options.dtype, options.dtype))
    if publication is not None:
        for line in publish(source, output, publication):
            print(line)
    elif output is not None:
        write(source, output)
        print(output)
    return 0


def _parser() -> CommandParser:
    parser = make_parser("convert", DESCRIPTION)
    parser.add_argument("source", type=str, help="a file, a folder, frozen:NAME, or a Hugging Face id such as gpt2")
    parser.add_argument(
        "output", type=str | None, nargs="?", help="the .ckpt or .gguf to write, or the folder with --to hf"
    )
    text = "with an adapter, which is then the second name: the file or folder to write"
    parser.add_argument("merged_output", type=str | None, nargs="?", help=text)
    _add_format_options(parser)
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


_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_DTYPES = (*_TORCH_NAMES, "q8_0", "q4_0", *_TORCH_NAMES.values(), "float64")
_FORMATS = ("lit_gpt", "hf", "gguf", "peft")


def _add_format_options(parser: ArgumentParser) -> None:
    """The options that say what is written."""
    parser.add_argument(
        "--to",
        type=str | None,
        default=None,
        help="the format to write: lit_gpt, hf, gguf, or peft for an adapter; left out, lit_gpt, or gguf for an output "
        "that ends in .gguf",
    )
    parser.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help="dtype of the weights: f32, bf16, f16 or float64, and in GGUF q8_0 or q4_0; the source's if left out",
    )
    parser.add_argument(
        "--modelfile", action=ActionYesNo, nargs="?", default=False, help="write Ollama's Modelfile beside a .gguf, too"
    )


def _is_to_gguf(options: Namespace) -> bool:
    """Whether GGUF is written. Raises UserError for unknown options, and if they do not go together."""
    to, dtype, output = options.to, options.dtype, options.output
    for option, value, known in (("to", to, _FORMATS), ("dtype", dtype, _DTYPES)):
        if value is not None and value not in known:
            raise UserError(f'--{option} "{value}" is unknown: {nearest(value, known)}')
    ends_in_gguf = output is not None and Path(output).suffix == ".gguf"
    to_gguf = to == "gguf" or (to is None and ends_in_gguf)
    if to == "lit_gpt" and ends_in_gguf:
        raise UserError(f"--to lit_gpt does not write {output}: leave --to out, or name a .ckpt")
    if dtype in ("q8_0", "q4_0") and not to_gguf:
        raise UserError(
            f"--dtype {dtype} is one of GGUF: name an output that ends in .gguf, or choose f32, f16 or bf16"
        )
    if dtype == "float64" and to_gguf:
        raise UserError("--dtype float64 is none of GGUF: choose f32, f16, bf16, q8_0 or q4_0")
    if options.push is not None and to not in (None, "hf"):
        raise UserError(f"--push uploads a Hugging Face folder: leave --to {to} out")
    if options.modelfile and not to_gguf:
        raise UserError("--modelfile goes with GGUF: name an output that ends in .gguf")
    return to_gguf


def _name_positions(options: Namespace) -> None:
    """BASE ADAPTER OUTPUT, of three names; of two the second is the output."""
    options.adapter = None
    if options.merged_output is not None:
        options.adapter, options.output = options.output, options.merged_output


def _convert_to_peft(options: Namespace, output: Path | None) -> int:
    """Write an adapter as a folder of PEFT's.

    Raises:
        UserError: if the source is a whole model, or options of one are given.
    """
    from lit_gpt.convert.peft import write_peft
    from lit_gpt.convert.recognise import open_adapter, open_adapter_and_base, open_source

    for name in ("dtype", "tokenizer", "modelfile", "push"):
        if options[name]:
            raise UserError(f"--{name} is for whole models: leave it out with --to peft")
    assert output is not None
    if options.adapter is None:
        adapter, base = open_adapter_and_base(options.source)
    else:
        base = open_source(options.source, None, options.n_head, "lit_gpt convert --n_head N")
        adapter = open_adapter(options.adapter, base)
    write_peft(adapter, base, output)
    print(output)
    return 0


def _gguf_writer(output: Path, dtype: str | None, with_modelfile: bool) -> Callable[[SourceCheckpoint, Path], None]:
    """What writes a GGUF file, and its Modelfile if it is asked for.

    Raises:
        UserError: if there is a Modelfile already.
    """
    from lit_gpt.convert.gguf_write import write_gguf
    from lit_gpt.convert.modelfile import modelfile_path, write_modelfile

    beside = modelfile_path(output) if with_modelfile else None

    def write(source: SourceCheckpoint, path: Path) -> None:
        write_gguf(source, path, dtype)
        if beside is not None:
            write_modelfile(source, path, beside)
            note(f"wrote {beside}")

    return write
