"""The values that a sweep tries: lists and ranges, all of them in turn or drawn at random."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lit_gpt.errors import UserError

Values = dict[str, str]
"""Key → value of one configuration, as `fit` takes them on its command line."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_RESERVED = {
    "config": "name base files with --config",
    "ckpt_path": "every run of a sweep is a new one; --set init_from=MODEL starts from weights",
    "print_config": "leave it out",
    "trainer.default_root_dir": "--output says where the runs go",
}
_DIGITS = 6  # of a number drawn from a range


@dataclass(frozen=True)
class SweptKey:
    """A key of `fit` and what it is to be: one of some values, or a number of a range.

    Attributes:
        key: dotted.
        choices: the values, as written; none for a range.
        low: the range's least number.
        high: its greatest.
        is_whole: whether its numbers are integers.
        is_log: whether their logarithms are drawn evenly, and not they.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_whole: bool = False
    is_log: bool = False

    @property
    def is_range(self) -> bool:
        """Whether it is a range."""
        return not self.choices

    @property
    def ends(self) -> tuple[str, ...]:
        """Its values, or of a range the two ends: what can be checked before anything is drawn."""
        return self.choices or (self.text_of(self.low), self.text_of(self.high))

    def text_of(self, number: float) -> str:
        """A number of the range as `fit` takes it."""
        return str(round(number)) if self.is_whole else f"{number:.{_DIGITS}g}"

    def draw(self, generator: random.Random) -> str:
        """A value, each as likely as any other."""
        if self.choices:
            return generator.choice(self.choices)
        if self.is_log:
            number = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
            return self.text_of(min(max(number, self.low), self.high))
        return self.text_of(
            generator.randint(int(self.low), int(self.high))
            if self.is_whole
            else generator.uniform(self.low, self.high)
        )


def parse_settings(settings: Sequence[str]) -> list[SweptKey]:
    """The keys of several `--set KEY=VALUE,VALUE` or `--set KEY=LOW..HIGH`.

    Raises:
        UserError: for what is neither, a key that is named twice, or one that the sweep itself needs.
    """
    keys = [_parse_setting(setting) for setting in settings]
    for number, key in enumerate(keys):
        if key.key in {earlier.key for earlier in keys[:number]}:
            raise UserError(f"--set {key.key} is given twice: write all of its values in one, {key.key}=VALUE,VALUE")
        if key.key in _RESERVED:
            raise UserError(f"--set {key.key} cannot be swept: {_RESERVED[key.key]}")
    return keys


def _parse_setting(setting: str) -> SweptKey:
    key, equals, text = setting.partition("=")
    key, text = key.strip().lstrip("-"), text.strip()
    if not equals or not _KEY.fullmatch(key):
        raise UserError(f"--set {setting} has no KEY=VALUES: write it as model.optimizer.lr=0.001,0.002")
    if found := _RANGE.fullmatch(text):
        return _range(key, text, bool(found[1]), found[2], found[3])
    choices = _split(text)
    if not all(choices):
        raise UserError(f"--set {setting} has an empty value: write KEY=VALUE,VALUE, and null for none")
    twice = next((value for number, value in enumerate(choices) if value in choices[:number]), None)
    if twice is not None:
        raise UserError(f"--set {setting} names {twice} twice: leave one out; --seeds makes several runs of each")
    return SweptKey(key, tuple(choices))


def _range(key: str, text: str, is_log: bool, low_text: str, high_text: str) -> SweptKey:
    low, high = float(low_text), float(high_text)
    if not low < high < math.inf:
        raise UserError(f"--set {key}={text}: the range must go up, as 0.001..0.01")
    if is_log and low <= 0:
        raise UserError(f"--set {key}={text}: {low_text} has no logarithm: begin above 0, or leave log: out")
    is_whole = all(re.fullmatch(r"[-+]?\d+", number) for number in (low_text, high_text))
    return SweptKey(key, (), low, high, is_whole, is_log)


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no bracket and no quotation marks."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def grid_size(keys: Sequence[SweptKey]) -> float:
    """How many configurations there are; infinitely many with a range."""
    return math.inf if any(key.is_range for key in keys) else math.prod(len(key.choices) for key in keys)


def grid_values(keys: Sequence[SweptKey]) -> list[Values]:
    """All configurations; the last key changes first.

    Raises:
        UserError: for a range.
    """
    for key in keys:
        if key.is_range:
            raise UserError(
                f"--set {key.key} is a range, of which a grid cannot try all: list values, or give --method random"
            )
    return [
        dict(zip([key.key for key in keys], values)) for values in itertools.product(*(key.choices for key in keys))
    ]


def random_values(keys: Sequence[SweptKey], draws: int, seed: int) -> list[Values]:
    """`draws` different configurations; the first ones stay the same when more are drawn.

    Raises:
        UserError: there are not as many.
    """
    size = grid_size(keys)
    if size < draws:
        raise UserError(f"--draws {draws}: there are only {size:.0f} configurations; give that, or --method grid")
    generator, drawn, failures = random.Random(seed), list[Values](), 0
    while len(drawn) < draws:
        values = {key.key: key.draw(generator) for key in keys}
        if values not in drawn:
            drawn.append(values)
            failures = 0
            continue
        failures += 1
        if failures > 1000 * (len(drawn) + 1):  # a range of few integers
            raise UserError(f"--draws {draws}: the ranges have no more than {len(drawn)} configurations: draw fewer")
    return drawn


def shown(values: Values) -> str:
    """One configuration in a line."""
    return " ".join(f"{key}={value}" for key, value in values.items())
