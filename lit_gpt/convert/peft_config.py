"""`adapter_config.json` of PEFT: ranks and scales by module, and a refusal of what is more than LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.convert.schema import COUNT, NUMBER, SWITCH, TEXT, check_schema
from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.json_object import read_json

CONFIG = "adapter_config.json"
_SCHEMA = {
    "peft_type": str,
    "r": COUNT,
    "lora_alpha": NUMBER,
    "use_rslora": SWITCH,
    "bias": TEXT,
    "rank_pattern": ({str: int}, None),
    "alpha_pattern": ({str: (int, float)}, None),
    "trainable_token_indices": ([int], {str: [int]}, None),
}
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "modules_to_save", "layer_replication", "alora_invocation_tokens", "use_qalora"),
    *("target_parameters", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"),
)
"""Fields of what is more than a low-rank term beside a frozen matrix."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that change the base's weights, which are then not those of the base."""
_PATTERN = re.compile(r"[\w.\\^$()|\[\]-]{1,200}")
"""Regular expressions without repetition: those of a hostile file could search for ever."""


@dataclass(frozen=True)
class PeftConfig:
    """Ranks and scales of an adapter of PEFT's.

    Attributes:
        rank: of the modules that no pattern names.
        alpha: likewise.
        rank_stabilized: whether scales are alpha / √rank.
        rank_pattern: end of a module's name, as a regular expression → rank.
        alpha_pattern: likewise → alpha.
        tokens: end of a module's name → ids whose rows are trained; "" for the embedding's.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    tokens: Mapping[str, list[int]]

    def rank_of(self, module: str) -> int:
        """The rank of a module's term."""
        return _lookup(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's term."""
        rank = self.rank_of(module)
        return _lookup(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def token_ids(self, module: str) -> list[int]:
        """The ids whose rows are trained in a module; none where it names others."""
        return next((ids for end, ids in self.tokens.items() if not end or f".{module}".endswith(f".{end}")), [])


def _lookup(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """As PEFT finds a module in a pattern: the first whose expression matches the end of its name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_peft_config(folder: Path, where: str) -> PeftConfig:
    """The config of an adapter folder.

    Raises:
        UserError: naming the field that asks for what is not done here.
    """
    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {brief(values.get('peft_type'))} is not LORA, the only one that is read")
    check_schema(values, _SCHEMA, f"{where}: {CONFIG}")
    for name in _UNSUPPORTED:
        if values.get(name):
            raise UserError(f"{where}: {name}={brief(values[name])} is not supported: merge it with PEFT, convert that")
    if values.get("bias") not in (None, "none"):
        raise UserError(f"{where}: bias={brief(values['bias'])} is not supported: merge it with PEFT, convert that")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UserError(f"{where}: init_lora_weights={brief(init)} changes its base: merge it with PEFT, convert that")
    patterns = [values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    for key in (key for pattern in patterns for key in pattern):
        _check_pattern(key, where)
    rank, alpha = values.get("r") or 8, values.get("lora_alpha") or 8
    ranks = [rank, *patterns[0].values()]
    if any(isinstance(one, bool) or one < 1 for one in ranks) or not math.isfinite(alpha):
        raise UserError(f"{where}: {CONFIG} has a rank below 1, or an alpha that is no number: it is damaged")
    tokens = values.get("trainable_token_indices") or {}
    tokens = {"": tokens} if isinstance(tokens, list) else tokens
    if any(token < 0 for ids in tokens.values() for token in ids):
        raise UserError(f"{where}: {CONFIG} has a token id below 0: it is damaged")
    return PeftConfig(rank, alpha, bool(values.get("use_rslora")), patterns[0], patterns[1], tokens)


def _check_pattern(key: str, where: str) -> None:
    try:
        if not _PATTERN.fullmatch(key):
            raise re.error("it has repetitions, or is long")
        re.compile(key)
    except re.error as error:
        raise UserError(f"{where}: the pattern {brief(key)} is not read ({error}): name the modules in it") from None
