"""One request's failure is its own: whatever it raises, the others come out right and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Serving, make_model, serving

from lit_gpt.generation.generation import Generation
from lit_gpt.generation.sampling import Sampler
from lit_gpt.serve.worker import Limits

Start = Callable[..., Serving]
PADDED = 320
"""Rows of a model whose byte tokenizer has 257 ids."""


@pytest.fixture(scope="module")
def padded() -> Iterator[Serving]:
    with serving(model=make_model(vocab_size=PADDED)) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [65, 300], "repetition_penalty": 1.2}, "prompt"),
        ("/v1/completions", {"prompt": [65, 300], "echo": True, "logprobs": 2, "max_tokens": 0}, "prompt"),
        ("/v1/completions", {"prompt": [65], "logit_bias": {"300": 5}}, "logit_bias"),
        ("/v1/completions", {"prompt": [65], "stop_token_ids": [300]}, "stop_token_ids"),
        ("/v1/next_token", {"prompt": [65, 300]}, "prompt"),
        ("/v1/next_token", {"prompt": [65], "generated": [300], "frequency_penalty": 1}, "generated"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
    ],
)
def test_an_id_beyond_the_tokenizer_of_a_padded_model_is_refused(
    padded: Serving, path: str, body: dict[str, Any], param: str
) -> None:
    answer = padded.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert "300" in answer.text and "257" in answer.text
    assert padded.get("/health").status_code == 200
    assert padded.post("/v1/completions", {"prompt": [65, 256], "repetition_penalty": 1.2}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("where", ["strategy", "sampler", "submit", "stop"])
def test_an_exception_ends_its_own_request_and_is_logged_with_its_id(
    start: Start, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A marked request (`seed` 666) raises in a step of its own; one beside it and one after it come out right."""
    server = start(seconds=0.01, max_slots=4)
    good = {"prompt": "good", "max_tokens": 20, "ignore_eos": True, "seed": 1}
    right = server.complete(**good)["choices"][0]["text"]
    _break(where, monkeypatch, server)
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(server.complete, **good)
        body = {"prompt": "bad", "max_tokens": 20, "seed": 666, "n": 2}
        bad = server.post("/v1/completions", body, headers={"X-Request-Id": "the-bad-one"})
        assert beside.result()["choices"][0]["text"] == right
    assert bad.status_code == 500 and bad.json()["error"]["code"] == "generation_failed", bad.text
    assert "request=the-bad-one" in caplog.text and "secret" not in bad.text
    assert server.get("/health").status_code == 200
    server.wait_until_idle()
    assert server.service.worker.engine.slots.load == 0 and not server.service.worker._prompts
    assert server.complete(**good)["choices"][0]["text"] == right


def _break(where: str, monkeypatch: pytest.MonkeyPatch, server: Serving) -> None:
    def raising(method: Callable[..., Any], is_bad: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            if is_bad(self):
                raise IndexError("secret text")
            return method(self, *args, **options)

        return wrapped

    def is_bad_sampler(sampler: Sampler) -> bool:
        return sampler.seed in (666, 667) and sampler.position >= 2

    def is_bad_generation(generation: Generation) -> bool:
        return generation.generation_config.seed == 666

    if where == "strategy":
        monkeypatch.setattr(Generation, "emit", raising(Generation.emit, is_bad_generation))
    elif where == "sampler":
        monkeypatch.setattr(Sampler, "uniform", raising(Sampler.uniform, is_bad_sampler))
    elif where == "stop":
        monkeypatch.setattr(Generation, "outputs", raising(Generation.outputs, is_bad_generation))
    else:
        original = Generation.__init__

        def init(self: Generation, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            if is_bad_generation(self) and self.index == 1:
                raise IndexError("secret text")

        monkeypatch.setattr(Generation, "__init__", init)


@pytest.mark.slow
def test_an_engine_that_ends_fails_the_requests_that_it_had_not_come_to(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a request waited for as long as requests may wait for a slot."""
    server = start(limits=Limits(queue_seconds=600))

    class TheEnd(BaseException):
        pass

    def end(*args: Any, **options: Any) -> int:
        raise TheEnd

    monkeypatch.setattr(server.service.worker.engine, "submit", end)
    answer = server.post("/v1/completions", {"prompt": "a"}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert server.get("/health").status_code == 503
