"""Bodies of requests and responses: OpenAI's fields and vLLM's additions; no field is ignored.

Types are strict and unknown fields are refused: a misspelt field is an error and not a silent default. Every list and
every object has a limit, and a list ends at its first wrong item: pydantic collects an error for each otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.serve.api_errors import bad_request


def _encodable(text: str) -> str:
    """The text itself; UnicodeEncodeError for a lone surrogate, which JSON allows and no response could quote."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
MAX_IDS = 1 << 20
MAX_PROMPTS = 4096
MAX_FIELDS = 64
MAX_BIASES = 1024
Ids = Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
PromptBody = (
    Text
    | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True)]
)
MAX_LOGPROBS = 20


def _few_biases(value: Any) -> Any:
    """The value itself; ValueError for too many, before each of them can be an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"has {len(value)} tokens, at most {MAX_BIASES} are read")
    return value


Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"an object of the body has {len(data)} fields, at most {MAX_FIELDS} are read")
        return data


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = False


class Sampling(Body):
    """The fields that completions and chat share. None means the default, as OpenAI has it."""

    model: str | None = None
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[Biases | None, BeforeValidator(_few_biases)] = Field(None)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    user: str | None = None
    # vLLM's extras
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    min_tokens: int | None = Field(0, ge=0)
    ignore_eos: bool | None = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    return_token_ids: bool | None = False  # the ids of the continuation beside its text

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if any(not (key.isascii() and key.isdecimal()) or len(key) > 10 for key in bias or {}):
            raise ValueError("its keys must be token ids")
        return bias

    @property
    def samples(self) -> int:
        """`n` with its default."""
        return self.n or 1

    def generation_config(
        self, max_new_tokens: int, logprobs: int | None = None, prompt_logprobs: int | None = None
    ) -> GenerationConfig:
        """The engine's settings. OpenAI's −100 means "never", so it becomes a ban.

        Raises:
            UserError: for a combination that makes no sense.
        """
        if (self.min_tokens or 0) > max_new_tokens:
            raise bad_request(f"min_tokens={self.min_tokens} exceeds max_tokens={max_new_tokens}", "min_tokens")
        bias = {int(key): value for key, value in (self.logit_bias or {}).items()}
        config = GenerationConfig(
            strategy="sample",
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_tokens or 0,
            num_samples=self.samples,
            temperature=effective_temperature(self.temperature),
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            logit_bias={token: value for token, value in bias.items() if value > -100},
            banned_tokens=[token for token, value in bias.items() if value <= -100],
            stop=self.stop or [],
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=bool(self.ignore_eos),
            seed=self.seed,
            overflow="stop",
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        config.check()
        return config


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: PromptBody
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=0)
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        """What OpenAI offers and this server does not.

        Raises:
            ApiError: 400.
        """
        if self.best_of is not None and self.best_of > 1:
            raise bad_request("best_of above 1 is not supported: ask for n and choose", "best_of", "unsupported_value")
        if self.suffix:
            raise bad_request("suffix is not supported: this model only continues", "suffix", "unsupported_value")
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens=0 needs echo=true: otherwise nothing is left to return", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream=true", "stream_options")


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """A turn of a chat. Only text: no tools, no images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000, fail_fast=True)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def refuse_unsupported(self) -> None:
        """Combinations that mean nothing.

        Raises:
            ApiError: 400.
        """
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream=true", "stream_options")


class NextTokenRequest(Body):
    """`POST /v1/next_token`: the next token's distribution, and one draw from it.

    Attributes:
        generated: ids already written after the prompt: the draw's position is their number, and frequency and
            presence penalties count them.
        seed: of the draw; the same that a completion with this seed makes at this position.
        limit: candidates to return, likeliest first; the rest are summed up.
    """

    model: str | None = None
    prompt: Text | Ids
    generated: Ids = []
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    top_p: float | None = Field(1.0, gt=0, le=1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    seed: Seed = 0
    limit: int = Field(20, ge=1, le=200)


class TokenizeRequest(Body):
    """`POST /tokenize`, as vLLM has it."""

    model: str | None = None
    prompt: Text
    add_special_tokens: bool | None = False
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """`POST /detokenize`, as vLLM has it."""

    model: str | None = None
    tokens: Ids


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is not 2xx."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of a request: the prompts' (counted once however many samples), and all that was generated."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class CompletionLogprobs(BaseModel):
    """OpenAI's four lists: entry i of each belongs to one token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    """One continuation, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] = []


class CompletionResponse(BaseModel):
    """A completion, or a chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatCompletionResponse(BaseModel):
    """A chat completion, or a chunk of a streamed one (`delta` in place of `message`)."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class CandidateBody(BaseModel):
    """One possible next token.

    Attributes:
        text: the token as text, bytes that are no whole character as `bytes:\\xNN`.
        raw: the model's own probability.
        probability: after penalties, temperature and filters; 0 if it was cut.
        cut_by: the stage of sampling that cut it, or None; at temperature 0 that is `greedy`, but for the likeliest.
        start: where its interval begins on the line from 0 to 1 that the draw lands on.
        end: where it ends.
    """

    id: int
    text: str
    raw: float
    probability: float
    cut_by: (
        Literal["repetition_penalty", "frequency_presence_penalty", "temperature", "top_k", "top_p", "min_p", "greedy"]
        | None
    )
    start: float
    end: float


class DrawBody(BaseModel):
    """One draw from the distribution.

    Attributes:
        u: the random number in [0, 1), a function of seed and position alone; None at temperature 0.
        token: the candidate whose interval holds it.
    """

    seed: int
    position: int
    u: float | None
    token: CandidateBody


class NextTokenResponse(BaseModel):
    """The distribution after a prompt, and one draw from it.

    Attributes:
        tokens: the prompt's ids and texts.
        candidates: likeliest first, and the drawn one even if it is not among the `limit` likeliest.
        kept: how many tokens the filters left.
        rest_raw, rest_probability: what the tokens that are not listed have together.
        entropy, processed_entropy: in bits.
        eot_id: the token that ends a text, if there is one.
        context_left: tokens that still fit.
    """

    model: str
    tokens: list[dict[str, Any]]
    candidates: list[CandidateBody]
    kept: int
    vocabulary: int
    rest_raw: float
    rest_probability: float
    entropy: float
    processed_entropy: float
    draw: DrawBody
    eot_id: int | None
    context_left: int


def effective_temperature(temperature: float | None) -> float:
    """The temperature with its default; below 0.0001, where the scaled logits could overflow, 0: greedy, the limit."""
    value = _or(temperature, 1.0)
    return value if value >= 1e-4 else 0.0


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
