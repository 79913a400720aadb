"""The routes of the server."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from lit_gpt.errors import UserError
from lit_gpt.serve import protocol as P
from lit_gpt.serve.api_errors import ApiError, bad_request, from_http_exception, from_validation_error
from lit_gpt.serve.bodies import LARGE_BODY, make_route_class
from lit_gpt.serve.chat import plan_chat
from lit_gpt.serve.completions import Plan, full_body, plan_completion, stream_chunks
from lit_gpt.serve.middleware import AccessControl, BodyLimit, RequestLog
from lit_gpt.serve.next_token import next_token
from lit_gpt.serve.prometheus import CONTENT_TYPE
from lit_gpt.serve.service import Service, as_prompts
from lit_gpt.serve.streaming import EventStream, json_response
from lit_gpt.serve.training_text import ContinuationsRequest, ContinuationsResponse, continuations
from lit_gpt.tokenizer.ids import id_outside

PAGE = Path(__file__).parent / "page"

_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": P.ErrorBody, "description": "Refused, or failed"}}
_GENERATED: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {"description": "Whole, or with `stream` as server-sent events", "content": {"text/event-stream": {}}},
}


def create_app(service: Service, api_key: str | None = None, allowed_hosts: tuple[str, ...] = ()) -> FastAPI:
    """The server for one model.

    Args:
        service: what is served.
        api_key: what `Authorization: Bearer` must carry; None for no key.
        allowed_hosts: names, besides localhost and plain addresses, that a Host header may have; "*" for any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()
        service.close()

    app = FastAPI(title="lit_gpt", version=version(), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.route_class = make_route_class(service.in_thread)
    app.add_middleware(BodyLimit, metrics=service.metrics)
    app.add_middleware(AccessControl, metrics=service.metrics, api_key=api_key, allowed_hosts=allowed_hosts)
    app.add_middleware(RequestLog)
    _add_error_handlers(app, service)
    _add_completion_routes(app, service)
    _add_insight_routes(app, service)
    _add_tokenizer_routes(app, service)
    _add_model_routes(app, service)
    _add_engine_gauges(service)
    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def version() -> str:
    """The version of this package."""
    return importlib.metadata.version("lit_gpt")


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    def refuse(error: ApiError) -> Response:
        service.metrics.rejected.labels(error.code or "invalid_request").inc()
        return error.response()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refuse(error)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return refuse(bad_request(str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(from_validation_error(error))

    @app.exception_handler(HTTPException)
    async def router(request: Request, error: HTTPException) -> Response:
        return refuse(from_http_exception(error))


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    worker, metrics = service.worker, service.metrics

    async def respond(service: Service, request: Request, plan: Plan, reservation: ExitStack) -> Response:
        """Generate for `plan` with a model; `reservation` is held until the response has been sent."""
        metrics.prompt_tokens.inc(sum(len(ids) for ids in plan.prompts))
        log_fields = request.state.log
        log_fields.update(id=plan.id, prompts=len(plan.prompts), n=plan.generation_config.num_samples)
        if plan.request.stream:
            chunks = stream_chunks(service, plan, log_fields)
            return EventStream(chunks, metrics, reservation.pop_all().close, worker.limits.request_seconds)
        return await json_response(request, full_body(service, plan, log_fields), metrics)

    @app.post("/v1/completions", response_model=P.CompletionResponse, responses=_GENERATED)
    async def completions(body: P.CompletionRequest, request: Request) -> Response:
        """Continue prompts, as OpenAI's endpoint of this name; with `stream`, as server-sent events."""
        model = service.of_model(body.model)
        prompts = as_prompts(body.prompt)
        with ExitStack() as reservation:
            reservation.enter_context(worker.reserve(len(prompts) * body.samples))
            return await respond(model, request, await plan_completion(model, body, prompts), reservation)

    @app.post("/v1/chat/completions", response_model=P.ChatCompletionResponse, responses=_GENERATED)
    async def chat(body: P.ChatRequest, request: Request) -> Response:
        """Answer a conversation, where the checkpoint came with a chat template."""
        model = service.of_model(body.model)
        with ExitStack() as reservation:
            reservation.enter_context(worker.reserve(body.samples))
            return await respond(model, request, await plan_chat(model, body), reservation)


def _add_insight_routes(app: FastAPI, service: Service) -> None:
    worker, metrics = service.worker, service.metrics

    @app.post("/v1/next_token", response_model=P.NextTokenResponse, responses=_ERRORS)
    async def post_next_token(body: P.NextTokenRequest, request: Request) -> Response:
        """The next token's distribution, raw and processed, what is cut, and the draw for a seed and position."""
        model = service.of_model(body.model)
        with worker.reserve(1):
            return await json_response(request, next_token(model, body), metrics)

    @app.post("/v1/continuations", response_model=ContinuationsResponse, responses=_ERRORS)
    async def post_continuations(body: ContinuationsRequest, request: Request) -> Response:
        """What followed the end of a text in the training tokens, and how often, where these are served."""
        model = service.of_model(body.model)
        with worker.reserve(1):
            return await json_response(request, continuations(model, body), metrics)


async def _json(service: Service, result: dict[str, Any], tokens: int) -> Response:
    """`result` as JSON, which is written on a thread if it is about many tokens."""
    body = to_json(result) if 8 * tokens < LARGE_BODY else await service.in_thread(to_json, result)
    return Response(body, media_type="application/json")


def _add_tokenizer_routes(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: P.TokenizeRequest) -> Response:
        """Text to ids, as vLLM's endpoint of this name."""
        model = service.of_model(body.model)
        with service.worker.reserve(1):
            ids = await model.tokenize(body.prompt, bool(body.add_special_tokens))
            texts = await model.token_texts(ids) if body.return_token_strs else None
            length = service.config.block_size
            result = {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": texts}
            return await _json(service, result, len(ids))

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: P.DetokenizeRequest) -> Response:
        """Ids to text, as vLLM's endpoint of this name."""
        model = service.of_model(body.model)
        outside = id_outside(body.tokens, model.n_vocab)
        if outside is not None:
            raise bad_request(f"tokens has {outside}, outside the vocabulary of {model.n_vocab}", "tokens")
        with service.worker.reserve(1):
            return await _json(service, {"prompt": await model.detokenize(body.tokens)}, len(body.tokens))

    @app.get("/tokenizer_info", responses=_ERRORS)
    async def tokenizer_info() -> dict[str, Any]:
        """What a client needs to know about the tokenizer; the names are those that lm-eval reads."""
        names = service.special_names
        bos, eot = tokenizer.bos_id, tokenizer.eot_id
        return {
            "name": tokenizer.name,
            "hash": tokenizer.hash,
            "n_vocab": tokenizer.n_vocab,
            "bos_token": None if bos is None else names.get(bos),
            "eos_token": None if eot is None else names.get(eot),
            "pad_token": None,
            "eos_token_id": eot,
            "special_tokens": tokenizer.specials,
            "chat_template": tokenizer.chat_template,
        }


def _add_engine_gauges(service: Service) -> None:
    worker, metrics = service.worker, service.metrics
    engine = worker.engine
    metrics.gauge("requests_running", "Sequences in the engine's slots", lambda: engine.n_running)
    metrics.gauge("requests_waiting", "Sequences that wait for a slot", lambda: worker.reserved - engine.n_running)
    metrics.gauge("cache_usage_ratio", "Share of the key-value cache in use", lambda: engine.slots.load)
    metrics.gauge("slots", "Sequences that can run at once", lambda: engine.slots.n_slot)
    metrics.gauge("engine_up", "1 while the engine's thread lives", lambda: float(worker.stop_reason is None))


def _add_model_routes(app: FastAPI, service: Service) -> None:

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        """The models that are served: the base, and its adapters."""
        return {"object": "list", "data": [model.card() for model in (service, *service.adapters)]}

    @app.get("/v1/models/{model_id:path}", responses=_ERRORS)
    async def model(model_id: str) -> dict[str, Any]:
        """One model."""
        return service.of_model(model_id).card()

    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, str]:
        """200 while requests are accepted."""
        service.worker.check_open()
        return {"status": "ok"}

    @app.get("/version", responses=_ERRORS)
    async def versions() -> dict[str, str]:
        """The version of lit_gpt."""
        return {"version": version()}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
    async def metrics_page() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})
