"""Our own chat template, in ChatML's form, and templates without the tag that only transformers knows."""

from __future__ import annotations

import re

from lit_gpt.tokenizer.tokenizer import Tokenizer

TURN_BEGIN = "<|im_start|>"
TURN_END = "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role must be system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Nothing is added: no system message that nobody wrote. The assistant's turn ends with a token that it generates."""
BOS = "{{ bos_token }}"
"""In front of it where the model was trained with a token before every text."""

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with our chat template, and its special tokens appended to the vocabulary.

    One that has a template already is returned as it is.

    Raises:
        UserError: if text can become one of the special tokens.
    """
    if tokenizer.chat_template is not None:
        return tokenizer
    has_name = tokenizer.bos_id in tokenizer.specials.values()
    return tokenizer.with_specials([TURN_BEGIN, TURN_END], BOS + CHATML if has_name else CHATML)


def is_ours(template: str) -> bool:
    """Whether a template is the one that `with_chat_template` gives."""
    return template in (CHATML, BOS + CHATML)


def has_generation_tags(template: str) -> bool:
    """Whether the template itself says what the assistant generates."""
    return _GENERATION.search(template) is not None


def without_generation_tags(template: str) -> str:
    """A template that writes the same, without `{% generation %}`, which Jinja itself and llama.cpp do not know.

    In its stead comes a condition that always holds, since blocks also take away spaces around them.
    """
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)


def with_generation_tags(template: str) -> str:
    """The inverse of `without_generation_tags` for our own template; another is returned as it is."""
    return next((ours for ours in (CHATML, BOS + CHATML) if template == without_generation_tags(ours)), template)
