"""The address in `HF_ENDPOINT`, checked before `huggingface_hub` takes it apart, which it does when it is imported."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from lit_gpt.errors import UserError


def check_endpoint() -> None:
    """Raise UserError if `HF_ENDPOINT` is set and no address of the web."""
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if address and not is_address:
        raise UserError(f"HF_ENDPOINT={address[:100]} is no address: write https://huggingface.co, or unset it")
