"""The API described by its own structs: what /openapi.json holds. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from swarm import __version__

Bodies = Mapping[str, type[Any]]
"""Which struct each POST path takes."""

_ERRORS = {
    400: "The request cannot be answered as it stands.",
    401: "A valid API key is needed.",
    404: "This model is not served here.",
    408: "The request did not come in time.",
    413: "The request is too large.",
    415: "The request is not application/json.",
    429: "No room now; Retry-After says when to come again.",
    503: "Some blocks are served by nobody, or the route was lost.",
}


def document(bodies: Bodies, gets: Mapping[str, str]) -> dict[str, Any]:
    """Return the OpenAPI document. `gets`: the paths without a body, and what they tell."""
    kinds = list(dict.fromkeys(bodies.values()))
    shown, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(kinds, shown, strict=True))
    paths: dict[str, Any] = {}
    for path, kind in bodies.items():
        content = {"application/json": {"schema": schemas[kind]}}
        paths[path] = {
            "post": {
                "summary": (kind.__doc__ or "").splitlines()[0],
                "requestBody": {"required": True, "content": content},
                "responses": _responses(),
            }
        }
    for path, told in gets.items():
        paths[path] = {"get": {"summary": told, "responses": _responses()}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "swarm", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses() -> dict[str, Any]:
    found: dict[str, Any] = {"200": {"description": "The answer, or a stream of it."}}
    return found | {str(status): {"description": told} for status, told in _ERRORS.items()}
