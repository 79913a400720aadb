"""`POST /v1/chat/completions`: the conversation in the checkpoint's chat template, then an ordinary completion."""

from __future__ import annotations

import secrets
import time
from typing import Any

from lit_gpt.generation.outputs import Token
from lit_gpt.serve.api_errors import bad_request
from lit_gpt.serve.chat_template import TemplateFailed
from lit_gpt.serve.completions import ChoiceDelta, Plan, ResponseFormat, TokenEntry, finite
from lit_gpt.serve.protocol import ChatRequest, Message
from lit_gpt.serve.service import Service

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")
"""Special tokens by which chat models end a turn, besides end-of-text."""


def render(service: Service, messages: list[Message]) -> str:
    """The conversation in the model's template, up to where the assistant's turn begins.

    Raises:
        ApiError: 400 without a template, or if the template refuses the conversation.
    """
    template = service.tokenizer.chat_template
    if template is None:
        raise bad_request(
            "this checkpoint has no chat template, it only continues text: use /v1/completions",
            "messages",
            "no_chat_template",
        )
    names = service.special_names
    bos, eot = service.tokenizer.bos_id, service.tokenizer.eot_id
    variables = {
        "messages": [{"role": message.role, "content": message.text} for message in messages],
        "add_generation_prompt": True,
        "bos_token": "" if bos is None else names.get(bos, ""),
        "eos_token": "" if eot is None else names.get(eot, ""),
    }
    try:
        return service.templates.render(template, variables)
    except TemplateFailed as error:
        raise bad_request(f"the chat template refuses these messages: {error}", "messages") from None


def encode_chat(service: Service, messages: list[Message]) -> list[int]:
    """Ids of the conversation, in which only the template's own special tokens are special.

    If a message's text spells one, the messages are replaced by marks before rendering and put back as plain text, so
    that a message cannot end its own turn and begin one of another role.
    """
    encode = service.tokenizer.encode_with_specials
    if not any(name in message.text for message in messages for name in service.tokenizer.specials):
        return encode(render(service, messages))
    mark = f"\ue000{secrets.token_hex(8)}"
    marked = [Message(role=each.role, content=f"{mark}{i}\ue001") for i, each in enumerate(messages)]
    ids: list[int] = []
    first, *rest = render(service, marked).split(mark)
    ids += encode(first)
    for part in rest:
        number, _, after = part.partition("\ue001")
        ids += service.tokenizer.encode(messages[int(number)].text)
        ids += encode(after)
    return ids


async def plan_chat(service: Service, request: ChatRequest) -> Plan:
    """Check a request against the model and tokenise it.

    Raises:
        ApiError: 400.
    """
    arrived = time.perf_counter()
    request.refuse_unsupported()
    service.check_ids(request)
    service.check_length(sum(len(message.text) for message in request.messages), "messages")
    ids = await service.encode([await service.in_thread(encode_chat, service, request.messages)], "messages")
    context_left = service.config.block_size - len(ids[0])
    max_tokens = request.max_completion_tokens or request.max_tokens or max(1, context_left)
    service.check_context_length(ids, max_tokens)
    specials = service.tokenizer.specials
    ends = [*(request.stop_token_ids or []), *(specials[name] for name in _TURN_ENDS if name in specials)]
    request = request.model_copy(update={"stop_token_ids": ends})
    generation_config = request.generation_config(max_tokens, request.top_logprobs or 0 if request.logprobs else None)
    response_format = _response_format(service, bool(request.logprobs))
    return Plan(request, ids, [""], generation_config, arrived, response_format, id=f"chatcmpl-{secrets.token_hex(12)}")


def _response_format(service: Service, logprobs: bool) -> ResponseFormat:
    def last_fields(delta: ChoiceDelta) -> dict[str, Any]:
        scores = content_logprobs(service, delta.entries) if logprobs else None
        return {"logprobs": scores, "finish_reason": delta.finish_reason}

    def choice(delta: ChoiceDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text}
        return {"index": delta.index, "message": message, **last_fields(delta)}

    def chunk_choice(delta: ChoiceDelta) -> dict[str, Any]:
        role = {"role": "assistant"} if delta.first else {}
        return {"index": delta.index, "delta": {**role, "content": delta.text}, **last_fields(delta)}

    return ResponseFormat("chat.completion", "chat.completion.chunk", choice, chunk_choice)


def _logprob(service: Service, number: int, logprob: float | None) -> dict[str, Any]:
    data = service.tokenizer.token_bytes(number)
    return {"token": service.token_text(number), "logprob": finite(logprob), "bytes": list(data)}


def content_logprobs(service: Service, entries: list[TokenEntry]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def one(token: Token) -> dict[str, Any]:
        top = [_logprob(service, number, logprob) for number, logprob in token.top]
        return {**_logprob(service, token.id, token.logprob), "top_logprobs": top}

    return {"content": [one(entry.token) for entry in entries]}
