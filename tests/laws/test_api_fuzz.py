"""Whatever fits the API's own description, and much that does not, is answered: no 500, no hang."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from api_swarm import ApiSwarm, api_swarm, logs
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from swarm.gateway.app import BODIES, GETS

MODEL = "demo"
MOST_TOKENS = 3  # it is the API that is tried, not the model
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiSwarm]:
    home = tmp_path_factory.mktemp("home")
    with api_swarm(home, "0:8") as found:
        yield found
        assert httpx.get(f"{found.url}/health").json()["status"] == "ok"
        assert "num_requests_running 0.0" in httpx.get(f"{found.url}/metrics").text
    assert "Traceback" not in logs(home)


@pytest.fixture(scope="module")
def described(served: ApiSwarm) -> Any:
    """The description, with the model's name and small limits, so that much gets through."""
    document = httpx.get(f"{served.url}/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "model" in fields:
            fields["model"] = {"enum": [MODEL]}
        for limit in LIMITS:
            if limit in fields:
                fields[limit] = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
                schema["required"] = [*schema.get("required", []), limit]
    loaded = schemathesis.openapi.from_dict(document)
    loaded.config.update(base_url=served.url)
    return loaded


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, mode) for path in BODIES for mode in GenerationMode),
        *((path, GenerationMode.POSITIVE) for path in GETS),  # there is nothing to get wrong
    ],
)
def test_no_request_makes_a_server_error_or_hangs(
    described: Any, path: str, mode: GenerationMode
) -> None:
    operation = described[path]["POST" if path in BODIES else "GET"]

    @settings(SETTINGS, max_examples=100 if path in BODIES else 5)
    @given(case=operation.as_strategy(generation_mode=mode))
    def answered(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=(not_a_server_error, status_code_conformance), timeout=60)

    answered()
