"""UserError: bad input, with a message that says what to do about it."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. Its message is one line that names the value and the remedy.

    The program prints it to stderr and exits with status 2; from Python it is an ordinary `ValueError`.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt name: `did you mean "gpt2"?`, or the list of known names.

    >>> nearest("gpt-2", ["gpt2", "nano"])
    'did you mean "gpt2"?'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are: {', '.join(names)}"


def brief(value: object) -> str:
    """`repr`, of any length and depth, in at most some 80 characters: for errors about values from a file.

    >>> brief("a" * 1000)
    "'aaaaaaaaaaaa...aaaaaaaaaaaaa'"
    """
    try:
        return reprlib.repr(value)[:80]
    except ValueError:  # an int of more than 4300 digits
        return f"of type {type(value).__name__}"
