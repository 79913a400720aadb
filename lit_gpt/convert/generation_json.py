"""`generation_config.json`: what transformers, vLLM and others do where the user of a model says nothing."""

from __future__ import annotations

from typing import Any

from lit_gpt.tokenizer.chat_template import known_end_ids
from lit_gpt.tokenizer.tokenizer import Tokenizer

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""The defaults of our `GenerationConfig` under transformers' names. Its `top_k` keeps all tokens at 0, and is 50 where
a model does not say; `min_p` is off where it is absent. How long a text becomes is for its user to say."""


def generation_json(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The values of the file for a model with this tokenizer. Padding is end-of-text: no prompt holds it by itself.

    A model for chat ends at the end of its turn too: programs that stop at `eos_token_id` alone would go on with the
    user's next question.
    """
    eot, bos = (None, None) if tokenizer is None else (tokenizer.eot_id, tokenizer.bos_id)
    turn_ends = [] if tokenizer is None or tokenizer.chat_template is None else known_end_ids(tokenizer)
    ends = [*([] if eot is None else [eot]), *(end for end in turn_ends if end != eot)]
    eos = ends if len(ends) > 1 else ends[0] if ends else None
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eot}
    return {name: value for name, value in ids.items() if value is not None} | SAMPLING
