"""Ollama's Modelfile for a GGUF file: prompt template, stop words, context, and the sampling that `predict` has.

The format is described at github.com/ollama/ollama/blob/main/docs/modelfile.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from lit_gpt.console.messages import note
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.write import check_absent
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.tokenizer.chatml import is_ours

SAMPLING: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""What `GenerationConfig` has by default, in Ollama's words; a test compares them. Ollama's own defaults are others."""
_PLAIN = "{{ .Prompt }}"
_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_CHATML_END = "<|im_end|>"
_CHATML_STEPS = [
    "%formessageinmessages",
    "{'<|im_start|>'+message.role+'\\n'+message.content+'<|im_end|>\\n'",
    "%endfor",
    "%ifadd_generation_prompt",
    "{'<|im_start|>assistant\\n'",
    "%endif",
]
"""ChatML as a Jinja template, in the form that `_steps` gives it."""


def modelfile_path(gguf: Path) -> Path:
    """Where the Modelfile of this file goes.

    Raises:
        UserError: if one is there, or the file's name cannot stand in it.
    """
    if re.search(r"[\x00-\x1f\"]", gguf.name):
        raise UserError(f"a Modelfile cannot name {gguf.name!r}: choose a name without quotes and control characters")
    path = gguf.with_name("Modelfile")
    check_absent(path)
    return path


def write_modelfile(source: SourceCheckpoint, gguf: Path, path: Path) -> None:
    """Write the Modelfile with which `ollama create` makes a model of `gguf`."""
    with atomic_write(path, "w") as file:
        file.write(modelfile(source, gguf.name))


def modelfile(source: SourceCheckpoint, gguf: str) -> str:
    """The text of a Modelfile beside the file `gguf`."""
    tokenizer = source.tokenizer
    template, stops = _PLAIN, []
    if tokenizer is not None and tokenizer.chat_template is not None:
        if is_ours(tokenizer.chat_template) or is_chatml(tokenizer.chat_template):
            template, stops = _CHATML, [_CHATML_END]
        else:
            note("the chat template is not ChatML, the one that a Modelfile gets here: TEMPLATE is the plain prompt")
    if tokenizer is not None and tokenizer.end_of_text in tokenizer.specials and tokenizer.end_of_text not in stops:
        stops.append(str(tokenizer.end_of_text))
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in SAMPLING.items()]
    lines += [f"PARAMETER num_ctx {source.config.block_size}"]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def is_chatml(template: str) -> bool:
    """Whether a Jinja template is ChatML and nothing else, whatever its quotes and spaces.

    A template that adds a system message, strips contents or knows tools is another one.
    """
    return _steps(template) == _CHATML_STEPS


_TAG = re.compile(r"\{(?P<kind>[%{#])(?P<left>-?)(?P<body>.*?)(?P<right>-?)[%}#]\}", re.DOTALL)
_STRING = re.compile(r"('[^']*'|\"[^\"]*\")")


def _steps(template: str) -> list[str] | None:
    """The tags without spaces, in one spelling; None if there is text between them.

    Blocks eat the line's end after them and the spaces before them on their line, as transformers has it.
    """
    steps: list[str] = []
    end, after = 0, ""
    for tag in _TAG.finditer(template):
        between = _without_eaten(template[end : tag.start()], after)
        is_block = tag["kind"] != "{"
        if tag["left"]:
            between = between.rstrip()
        elif is_block and between.rpartition("\n")[2].strip(" \t") == "":
            between = between.rstrip(" \t")
        if between:
            return None
        end = tag.end()
        after = "spaces" if tag["right"] else "line's end" if is_block else ""
        if tag["kind"] != "#":
            steps.append(tag["kind"] + _spelled(tag["body"]))
    return None if _without_eaten(template[end:], after) else steps


def _without_eaten(text: str, after: str) -> str:
    """What is left of the text after a tag that eats all spaces, the end of its line, or nothing."""
    return text.lstrip() if after == "spaces" else text.removeprefix("\n") if after else text


def _spelled(body: str) -> str:
    """An expression without spaces, with single quotes, attributes by dots, and strings that are added up joined."""
    parts = _STRING.split(body)
    code = [re.sub(r"\s+", "", part) for part in parts[0::2]]
    strings = ["'" + part[1:-1].replace("\n", "\\n") + "'" for part in parts[1::2]]
    text = "".join(a + b for a, b in zip(code, [*strings, ""]))
    text = re.sub(r"\['(\w+)'\]", r".\1", text)
    return re.sub(r"(?<=[^\\])'\+'", "", text)
