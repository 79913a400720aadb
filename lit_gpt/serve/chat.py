"""`POST /v1/chat/completions`: the conversation in the checkpoint's chat template, then an ordinary completion."""

from __future__ import annotations

import secrets
import time
from typing import Any

from lit_gpt.generation.outputs import Token
from lit_gpt.serve.api_errors import bad_request
from lit_gpt.serve.completions import ChoiceDelta, Plan, ResponseFormat, TokenEntry, finite
from lit_gpt.serve.protocol import ChatMessage, ChatRequest
from lit_gpt.serve.service import Service
from lit_gpt.tokenizer.chat_template import Message, TemplateFailed


def encode_chat(service: Service, messages: list[ChatMessage]) -> tuple[list[int], tuple[int, ...]]:
    """Ids of the conversation up to where the assistant's turn begins, and the ids that end one.

    Raises:
        ApiError: 400 without a template, or if the template refuses the conversation.
    """
    template = service.chat_template
    if template is None:
        raise bad_request(
            "this checkpoint has no chat template, it only continues text: use /v1/completions",
            "messages",
            "no_chat_template",
        )
    try:
        ids = template.encode_prompt([Message(message.role, message.text) for message in messages])
    except TemplateFailed as error:
        raise bad_request(f"the chat template refuses these messages: {error}", "messages") from None
    return ids, template.end_ids


async def plan_chat(service: Service, request: ChatRequest) -> Plan:
    """Check a request against the model and tokenise it.

    Raises:
        ApiError: 400.
    """
    arrived = time.perf_counter()
    request.refuse_unsupported()
    service.check_ids(request)
    service.check_length(sum(len(message.text) for message in request.messages), "messages")
    prompt, turn_ends = await service.in_thread(encode_chat, service, request.messages)
    ids = await service.encode([prompt], "messages")
    context_left = service.config.block_size - len(ids[0])
    max_tokens = request.max_completion_tokens or request.max_tokens or max(1, context_left)
    service.check_context_length(ids, max_tokens)
    # End-of-text ends a completion anyway, unless `ignore_eos` says otherwise.
    ends = [*(request.stop_token_ids or []), *(end for end in turn_ends if end != service.tokenizer.eot_id)]
    request = request.model_copy(update={"stop_token_ids": ends})
    generation_config = request.generation_config(max_tokens, request.top_logprobs or 0 if request.logprobs else None)
    response_format = _response_format(service, bool(request.logprobs), bool(request.return_token_ids))
    return Plan(request, ids, [""], generation_config, arrived, response_format, id=f"chatcmpl-{secrets.token_hex(12)}")


def _response_format(service: Service, logprobs: bool, token_ids: bool) -> ResponseFormat:
    def last_fields(delta: ChoiceDelta) -> dict[str, Any]:
        scores = content_logprobs(service, delta.entries) if logprobs else None
        ids = {"token_ids": [entry.token.id for entry in delta.entries]} if token_ids else {}
        return {"logprobs": scores, **ids, "finish_reason": delta.finish_reason}

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
