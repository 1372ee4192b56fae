"""Why a body cannot be read, said as OpenAI says it: which field, what was expected, what came."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sentinel_proxy.errors import ApiError, invalid_request

# The decoder says what is wrong in its own words and where as a path; a test holds every one of these forms.
_PLACE: Final = re.compile(r" - at `\$\.?(?P<param>[^`]*?)(?:\[\.\.\.\].*)?`$")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>\w+)`")
_TYPE: Final = re.compile(r"Expected `(?P<expected>[^`]+)`, got `(?P<got>\w+)`")
_RANGE: Final = re.compile(r"Expected `int` (?P<sign>[<>]=) (?P<bound>-?\d+)")
_LENGTH: Final = re.compile(r"Expected `(?P<type>\w+)` of length (?P<sign>[<>]=) (?P<bound>\d+)")
_WORDS: Final = {
    "str": "a string",
    "int": "an integer",
    "float": "a decimal number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def refusal(error: Exception) -> ApiError:
    """The 400 for what the decoder raised."""
    if isinstance(error, RecursionError):
        return invalid_request("The JSON body of your request is nested too deeply.", code="invalid_json")
    if isinstance(error, UnicodeDecodeError):
        return invalid_request("The JSON body of your request is not valid UTF-8.", code="invalid_json")
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return invalid_request(f"We could not parse the JSON body of your request: {text}.", code="invalid_json")
    return _invalid(text)


def _invalid(text: str) -> ApiError:
    place = _PLACE.search(text)
    param = place["param"] if place else ""
    if missing := _MISSING.match(text):
        return missing_parameter(f"{param}.{missing['name']}" if param else missing["name"])
    if wrong := _TYPE.match(text):
        return _wrong_type(param, wrong["expected"], wrong["got"])
    if bound := _RANGE.match(text):
        return _out_of_range(param, sign=bound["sign"], bound=bound["bound"])
    if length := _LENGTH.match(text):
        return _wrong_length(param, kind=length["type"], sign=length["sign"], bound=length["bound"])
    return invalid_request(f"Invalid '{param}': the value cannot be read.", param=param or None, code="invalid_value")


def missing_parameter(param: str) -> ApiError:
    """The 400 for a field that must be there."""
    return invalid_request(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def _wrong_type(param: str, expected: str, got: str) -> ApiError:
    names = [_WORDS.get(name, name) for name in expected.split(" | ")]
    wanted = " or ".join(name for name in names if name != "null") or "null"
    came = _WORDS.get(got, got)
    if not param:
        return invalid_request(
            f"The body of your request must be {wanted}, but got {came} instead.", code="invalid_type"
        )
    return invalid_request(
        f"Invalid type for '{param}': expected {wanted}, but got {came} instead.", param=param, code="invalid_type"
    )


def _out_of_range(param: str, *, sign: str, bound: str) -> ApiError:
    below = sign == ">="
    return invalid_request(
        f"Invalid '{param}': integer {'below minimum' if below else 'above maximum'} value. "
        f"Expected a value {sign} {bound}.",
        param=param,
        code="integer_below_min_value" if below else "integer_above_max_value",
    )


def _wrong_length(param: str, *, kind: str, sign: str, bound: str) -> ApiError:
    noun = "string" if kind == "str" else "array"
    if sign == "<=":
        return invalid_request(
            f"Invalid '{param}': {noun} too long. Expected a maximum length of {bound}.",
            param=param,
            code=f"{noun}_above_max_length",
        )
    return invalid_request(
        f"Invalid '{param}': empty {noun}. Expected a minimum length of {bound}.", param=param, code=f"empty_{noun}"
    )
