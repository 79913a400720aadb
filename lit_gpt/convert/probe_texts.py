"""Texts that tell tokenizers apart, to compare ours with those of other projects on."""

from __future__ import annotations

import random
from functools import cache


@cache
def probe_texts() -> tuple[str, ...]:
    """Texts that tell pre-tokenizers apart: contractions, runs of digits and of spaces, line ends, many scripts."""
    fixed = [
        "Hello world! I'll, we've, YOU'RE, 'tis 'Twas don't DON'T it's IT'S ſ'ſ K'K",
        "0 00 000 0000 12345 1,234.5 3.14e-10 ½ ² Ⅷ ٣٤٥ 一二三 x1y22z333 4 5  6   7\t8\n9 1 a1 1a",
        "  two   three    \t tabs\t\t\n\n new\r\nlines\r\r end   ",
        *("x" + " " * count + end for count in (2, 3, 8, 24, 25, 49, 51) for end in ("", "y", "\n", "\n  z", "\t 1")),
        "a\n b\n  c\n\n\n   \n d \n", " ", "  ", "\n", " \n", "\n ", "\t\n\x0b\x0c\r\x1c\x85\xa0\u2003\u2028\u3000x",
        "def f(x):\n    return {**x, 'a': [1, 2]}  # ok\n\tif not x == y != z: pass;;;//\\\\ --> <- ... ?!?!",
        "naïve café cafe\u0301 Å Å e\u0301\u0323 \u1100\u1161\u11a8 각 ﬁ ǅ",
        "你好，世界。日本語のテキスト 한국어 العربية עברית हिन्दी ไทย Ελληνικά Русский",
        "👩‍👩‍👧 🇩🇪 👍🏽 e\ufe0f \u200b\u200d\ufeff \ufffd \U0010ffff \x00\x01\x7f",
    ]  # fmt: skip
    draw = random.Random(0)
    pools = [range(0x20, 0x7F), range(0x80, 0x600), range(0x2000, 0x3400), range(0x10000, 0x20000), range(0xD800)]
    mixed = [
        "".join(chr(draw.choice(draw.choice(pools))) + draw.choice(["", "", " ", "1", "a", "\n"]) for _ in range(24))
        for _ in range(400)
    ]
    return (*fixed, *mixed)
