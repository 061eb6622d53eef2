"""`/docs`: the endpoints and the fields of their requests, made of the OpenAPI schema, without files of others."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ schema.info.title }}: endpoints</title>
<link rel="icon" href="/page/icon.svg">
<link rel="stylesheet" href="/page/page.css">
</head>
<body>
<main>
<h1>Endpoints</h1>
<p>{{ schema.info.summary }} <a href="/openapi.json">The OpenAPI schema</a> has the same for programs.</p>
{% for one in endpoints %}
<section>
<h2>{{ one.method }} {{ one.path }}</h2>
<p>{{ one.about }}</p>
{% if one.fields %}
<ul>
{% for name, kind, required, about in one.fields %}
<li><code>{{ name }}</code>: {{ kind }}{{ ", required" if required }}{{ "; " + about if about }}</li>
{% endfor %}
</ul>
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


def html(schema: dict[str, Any]) -> str:
    """The page of an OpenAPI schema."""
    endpoints = [
        {
            "method": method.upper(),
            "path": path,
            "about": told.get("description", told.get("summary", "")),
            "fields": _fields(told, schema),
        }
        for path, methods in schema["paths"].items()
        for method, told in methods.items()
    ]
    return Environment(autoescape=True).from_string(_PAGE).render(schema=schema, endpoints=endpoints)


def _fields(told: dict[str, Any], schema: dict[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Name, kind, whether it is required, and description of each field of a request's body."""
    found = []
    for content in told.get("requestBody", {}).get("content", {}).values():
        body = _resolved(content["schema"], schema)
        for name, field in body.get("properties", {}).items():
            found.append((name, _kind(field), name in body.get("required", ()), field.get("description", "")))
    return found


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    for joined in ("anyOf", "oneOf", "allOf"):
        if joined in field:
            return " or ".join(_kind(one) for one in field[joined])
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("const", field.get("type", "any")))


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema with its reference followed."""
    found: dict[str, Any] = schema
    for name in str(part["$ref"]).removeprefix("#/").split("/") if "$ref" in part else ():
        found = found[name]
    return found if "$ref" in part else part
