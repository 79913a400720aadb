"""The YAML files of `configs/`, which an installed package carries along, so that the guides' commands run anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_gpt.console.messages import note
from lit_gpt.train.rank_zero import is_rank_zero

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
_OPTIONS = ("--config", "-c")


def use_shipped_configs(argv: Sequence[str]) -> list[str]:
    """`argv`, where a `--config configs/NAME` that the current folder lacks is the package's file of that name.

    A file in the current folder goes first, whatever is in it. Any other path is left as it is, for the parser.
    """
    words: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if words and words[-1] in _OPTIONS:
            words.append(_shipped(word))
        elif option in _OPTIONS and equals:
            words.append(f"{option}={_shipped(value)}")
        else:
            words.append(word)
    return words


def _shipped(name: str) -> str:
    path = Path(name)
    installed = SHIPPED / path.name
    if path.parts != ("configs", path.name) or path.exists() or not installed.is_file():
        return name
    if is_rank_zero():
        note(f"lit_gpt: there is no {name} in this folder: the installed {installed} is read")
    return str(installed)
