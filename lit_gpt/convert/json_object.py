"""JSON files that hold one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if it is missing, damaged or something else."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: get it again")
    return values
