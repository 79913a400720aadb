"""The used parts of a `tokenizer.json` of BPE over characters with byte fallback, every value checked.

The `tokenizers` library ends in a panic, or takes memory without end, on some of what it does not expect; and a step
that it does and that decoding here does not know would give another text.
"""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.vocabulary import MAX_ID, MAX_TOKENS

SPACE = "\u2581"
"""The character that stands for a space."""
BYTE_TOKENS = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}

_METASPACE = {
    "replacement": (SPACE,),
    "prepend_scheme": ("first", "always", "never"),
    "split": (True, False),
}
_STEPS: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "normalizer": {
        "Prepend": {"prepend": (SPACE,)},
        "Replace": {"pattern": ({"String": " "},), "content": (SPACE,)},
    },
    "pre_tokenizer": {
        "Metaspace": _METASPACE,
        "Split": {"pattern": ({"String": " "},), "behavior": ("MergedWithPrevious",), "invert": (False,)},
    },
    "decoder": {
        "Replace": {"pattern": ({"String": SPACE},), "content": (" ",)},
        "ByteFallback": {},
        "Fuse": {},
        "Strip": {"content": (" ",), "start": (0, 1), "stop": (0,)},
        "Metaspace": _METASPACE,
    },
}
"""Part of the file → kind of a step → its settings, and the values of each with which it is done here."""
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_STEPS = 8
_REMEDY = "choose another model"


def checked_content(values: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `tokenizer.json` that are used, and nothing else.

    Raises:
        UserError: for a value of another type or size, and a step or setting that is not done here, naming it.
    """
    model = _checked_model(values.get("model"))
    steps = {part: _checked_steps(part, values.get(part)) for part in _STEPS}
    added = _checked_added(values.get("added_tokens"), model["vocab"])
    kinds = {part: [step["type"] for step in found] for part, found in steps.items()}
    if not ("Replace" in kinds["normalizer"] or "Metaspace" in kinds["pre_tokenizer"]):
        raise UserError(f"its spaces are not written as {SPACE}, which is not supported: {_REMEDY}")
    if not ("Metaspace" in kinds["decoder"] or {"Replace", "ByteFallback"} <= set(kinds["decoder"])):
        raise UserError(f"its decoder does not turn {SPACE} into spaces and bytes into text: {_REMEDY}")
    special = {token["content"] for token in added if token["special"]}
    odd = next((f"{left}{right}" for left, right in model["merges"] if {left, right, left + right} & special), None)
    if odd is not None:
        raise UserError(f"text can merge into its special token {brief(odd)}: {_REMEDY}")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **{part: _written_steps(part, found) for part, found in steps.items()},
        "post_processor": None,
        "model": model,
    }


def steps_of(content: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a part of checked content, one by one."""
    found = content[part]
    if found is None:
        return []
    return found[_LISTS[part]] if found["type"] == "Sequence" else [found]


def _written_steps(part: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(steps) > 1:
        return {"type": "Sequence", _LISTS[part]: steps}
    return steps[0] if steps else None


def _checked_steps(part: str, value: Any) -> list[dict[str, Any]]:
    """The steps of a part, a sequence or a single one."""
    if value is None:
        return []
    if not isinstance(value, dict):
        raise UserError(f"its {part} is {brief(value)}, not an object: get it again")
    steps = value.get(_LISTS[part]) if value.get("type") == "Sequence" else [value]
    if not isinstance(steps, list) or len(steps) > _MOST_STEPS:
        raise UserError(f"its {part} is a sequence of {brief(steps)}: {_REMEDY}")
    return [_checked_step(part, step) for step in steps]


def _checked_step(part: str, step: Any) -> dict[str, Any]:
    kind = step.get("type") if isinstance(step, dict) else step
    if not isinstance(kind, str) or kind not in _STEPS[part]:
        raise UserError(f"its {part} {brief(kind)} is not supported, only {', '.join(_STEPS[part])}: {_REMEDY}")
    if kind == "Metaspace":  # older files say it with a switch
        scheme = "never" if step.get("add_prefix_space") is False else "always"
        step = {"prepend_scheme": scheme, "split": True, **step}
    checked = {"type": kind}
    for setting, allowed in _STEPS[part][kind].items():
        value = step.get(setting)
        if value not in allowed:
            raise UserError(f"its {part} {kind} with {setting}={brief(value)} is not supported: {_REMEDY}")
        checked[setting] = allowed[allowed.index(value)]
    return checked


def _checked_model(model: Any) -> dict[str, Any]:
    """The vocabulary and its merges."""
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("byte_fallback") is not True:
        raise UserError(f"its model is no BPE with byte fallback: {_REMEDY}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise UserError(f"{setting}={brief(model[setting])} is not supported: {_REMEDY}")
    for setting in ("fuse_unk", "ignore_merges"):
        if not isinstance(model.get(setting, False), (bool, type(None))):
            raise UserError(f"{setting}={brief(model[setting])} is not true or false: get it again")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise UserError("it has no vocab and merges: get it again")
    _check_ids(vocabulary)
    missing = [token for token in BYTE_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(f"it lacks {len(missing)} of the 256 bytes, {missing[0]} first: {_REMEDY}")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,  # never needed where all bytes are tokens
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": bool(model.get("fuse_unk")),
        "byte_fallback": True,
        "ignore_merges": bool(model.get("ignore_merges")),
        "vocab": dict(vocabulary),
        "merges": [_checked_merge(merge, vocabulary) for merge in merges],
    }


def _check_ids(ids: dict[Any, Any]) -> None:
    """Raise UserError for tokens that are no text, too many, or without an id of their own."""
    if len(ids) > MAX_TOKENS:
        raise UserError(f"it has {len(ids)} tokens, more than {MAX_TOKENS}: {_REMEDY}")
    for token, number in ids.items():
        if not isinstance(token, str) or not token:
            raise UserError(f"{brief(token)} is no token: get it again")
        if type(number) is not int or not 0 <= number < MAX_ID:
            raise UserError(f"the id {brief(number)} of {brief(token)} is not in 0 … {MAX_ID - 1}: get it again")
    seen: dict[int, str] = {}
    for token, number in ids.items():
        if seen.setdefault(number, token) != token:
            raise UserError(f"{brief(seen[number])} and {brief(token)} have one id, {number}: get it again")


def _checked_merge(merge: Any, vocabulary: dict[str, int]) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise UserError(f"the merge {brief(merge)} is no pair: get it again")
    for token in (*pair, pair[0] + pair[1]):
        if token not in vocabulary:
            raise UserError(f"the merge {brief(merge)} is of {brief(token)}, which is no token: get it again")
    return pair


def _checked_added(tokens: Any, vocabulary: dict[str, int]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before it is merged."""
    if not isinstance(tokens, (list, type(None))) or len(tokens or ()) > MAX_TOKENS:
        raise UserError(f"its added_tokens are {brief(tokens)}: get it again")
    checked, ids = [], {}
    for token in tokens or ():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or content in ids:
            raise UserError(f"its added token {brief(token)} is no text of its own: get it again")
        flags = {flag: token.get(flag, False) for flag in _FLAGS}
        odd = next((flag for flag, value in flags.items() if not isinstance(value, bool)), None)
        if odd is not None:
            raise UserError(f"{odd} of its added token {brief(content)} is {brief(flags[odd])}: get it again")
        ids[content] = token.get("id")
        if vocabulary.get(content, ids[content]) != ids[content]:
            raise UserError(f"its added token {brief(content)} has another id in the vocabulary: get it again")
        checked.append({"id": ids[content], "content": content, **flags})
    _check_ids({**vocabulary, **ids})
    return checked
