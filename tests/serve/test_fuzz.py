"""The server against its own OpenAPI schema, by schemathesis: whatever is sent, no 500 and no undocumented answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from fuzzing import EXAMPLES, fuzz
from serving import Serving, serving

MODES = ("POSITIVE", "NEGATIVE")
SHARE = 0.2
"""Of the examples of other fuzz tests, for each path."""


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_no_500(fuzzed: Serving, mode: str) -> None:
    """Well-formed requests and ill-formed ones, on every path of the schema."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    wanted = getattr(schemathesis.GenerationMode, mode)
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            fuzz,
            max_examples=int(SHARE * EXAMPLES),
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=wanted))
        def send(case: Any) -> None:
            if mode == "POSITIVE" and isinstance(case.body, dict):
                case.body.pop("model", None)  # a random name is a 404, and nothing more would be tried
            response = case.call()
            checks = schemathesis.checks
            case.validate_response(
                response,
                checks=[
                    checks.not_a_server_error,
                    checks.response_schema_conformance,
                    checks.content_type_conformance,
                ],
            )
            seen.add((case.operation.label, response.status_code))

        try:
            send()
        except hypothesis.errors.Unsatisfiable:  # a path without parameters has nothing to be wrong
            assert mode == "NEGATIVE"
    assert fuzzed.service.worker.stop_reason is None
    statuses = {status for label, status in seen if label == "POST /v1/completions"}
    assert (200 if mode == "POSITIVE" else 400) in statuses and 500 not in statuses
