"""Random requests over the OpenAPI document (slow): none of them may make the server fail."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_no_request_makes_the_server_fail(start_server):
    server = start_server("--request-timeout", "2", "--max-tokens", "8")
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            nonlocal tried
            tried += 1
            response = case.call(timeout=30)
            assert response.status_code < 500 or response.status_code in (503, 504), (
                case.as_curl_command(),
                response.text,
            )

        check()
    assert tried > 200
    assert httpx.get(f"{server.url}/health").status_code == 200
