"""The types that values of another project's JSON must have, checked before any of them is used.

A schema is a type; `None`, for what may be missing or null; a list with the schema of its items; a dict with the
schema of some of its keys, or of all its values under the key `str`; or a tuple of alternatives.
"""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError, brief

Schema = Any
NUMBER = (int, float, None)
COUNT = (int, None)
TEXT = (str, None)
SWITCH = (bool, None)
_LARGEST = 1 << 63


def check_schema(value: object, schema: Schema, where: str) -> None:
    """Raise UserError, naming the value, if it has none of the types that `schema` allows."""
    alternatives = schema if isinstance(schema, tuple) else (schema,)
    fitting = [one for one in alternatives if _is_kind(value, one)]
    if not fitting:
        wanted = " or ".join(filter(None, map(_kind_name, alternatives)))
        raise UserError(f"{where} is {brief(value)}, not {wanted}: get it again")
    if isinstance(value, list):
        for item in value:
            check_schema(item, fitting[0][0], f"an item of {where}")
    elif isinstance(value, dict) and isinstance(fitting[0], dict):
        for key, inner in fitting[0].items():
            if key is str:
                for name, item in value.items():
                    check_schema(item, inner, f"{where}: {name:.60}")
            else:
                check_schema(value.get(key), inner, f"{where}: {key}")


def _is_kind(value: object, kind: Schema) -> bool:
    """Whether the value itself, without what is in it, is of this kind."""
    if kind is None:
        return value is None
    if isinstance(kind, (list, dict)):
        return isinstance(value, type(kind))
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return False
    return isinstance(value, kind)


def _kind_name(kind: Schema) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}
    if isinstance(kind, (list, dict)):
        return "a list" if isinstance(kind, list) else "an object"
    return "" if kind is None else names[kind]
