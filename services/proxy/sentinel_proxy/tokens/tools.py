"""Functions as OpenAI's models are shown them: not the JSON schema but TypeScript in a namespace.

The form is not published; this one gives the API's own counts for the published examples (docs/tokens.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

_DEPTH_MAX: Final = 32
_Visit = Callable[[], None]


def as_typescript(functions: list[dict[str, object]], visit: _Visit) -> str:
    """The namespace of all functions; `visit` is called for each function and property, and may raise to stop."""
    lines = ["namespace functions {", ""]
    for function in functions:
        visit()
        if description := _text(function.get("description")):
            lines.append(f"// {description}")
        parameters = function.get("parameters")
        properties = _properties(parameters, 0, visit) if isinstance(parameters, dict) else ""
        name = _text(function.get("name"))
        lines.append(f"type {name} = (_: {{\n{properties}\n}}) => any;" if properties else f"type {name} = () => any;")
        lines.append("")
    lines.append("} // namespace functions")
    return "\n".join(lines)


def _properties(schema: dict[str, object], depth: int, visit: _Visit) -> str:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return ""
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else frozenset()
    indent = "  " * depth
    lines = []
    for name, prop in properties.items():
        visit()
        if isinstance(prop, dict) and (description := _text(prop.get("description"))):
            lines.append(f"{indent}// {description}")
        lines.append(f"{indent}{name}{'' if name in needed else '?'}: {_type(prop, depth, visit)},")
    return "\n".join(lines)


def _type(prop: object, depth: int, visit: _Visit) -> str:
    if not isinstance(prop, dict) or depth > _DEPTH_MAX:
        return "any"
    for union in ("anyOf", "oneOf", "enum"):
        if isinstance(options := prop.get(union), list) and options:
            for _ in options:
                visit()
            return " | ".join(
                map(_literal, options) if union == "enum" else (_type(o, depth + 1, visit) for o in options)
            )
    kind = prop.get("type")
    if isinstance(kind, list):
        return " | ".join(_simple({**prop, "type": one}, depth, visit) for one in kind)
    return _simple(prop, depth, visit)


def _simple(prop: dict[str, object], depth: int, visit: _Visit) -> str:
    match prop.get("type"):
        case "integer":
            return "number"
        case "string" | "number" | "boolean" | "null" as kind:
            return str(kind)
        case "array":
            visit()
            return f"{_type(prop.get('items'), depth + 1, visit)}[]" if prop.get("items") else "any[]"
        case "object":
            return f"{{\n{_properties(prop, depth + 1, visit)}\n}}"
        case _:
            return "any"


def _literal(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, int | float | None) else "any"


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
