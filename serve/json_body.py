"""JSON bodies that become pydantic models, and what is said of those that do not."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from uni_instruct.errors import RequestError

_Model = TypeVar("_Model", bound=BaseModel)
_LONGEST_VALUE = 80


def parse_json(model: type[_Model], body: bytes) -> _Model:
    """The request in a JSON body; an empty one counts as {}. Raises RequestError for what does not fit.

    The remedy is the field's own: its first example.
    """
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise _request_error(model, error) from None


def _request_error(model: type[BaseModel], error: ValidationError) -> RequestError:
    """The first thing that pydantic found, in the project's words."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return RequestError("the body is not JSON", remedy='send an object, such as {"seeds": [7, 8]}')
    # The value comes from the client and may be megabytes long: only its beginning is ever made into text.
    value = _beginning(first["input"])
    if not first["loc"]:
        return RequestError(f"the body is {value}, not an object", remedy='send one, such as {"seeds": [7, 8]}')
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        fields = ", ".join(model.model_fields)
        return RequestError(f"field '{param[:_LONGEST_VALUE]}' is unknown", remedy=f"the fields are {fields}", param=param[:80])
    if first["type"] == "missing":
        value = "missing"
    place = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"][:2])
    example = (model.model_fields[param].examples or ["another value"])[0]
    return RequestError(f"{place} is {value}", remedy=f"give {example}", param=param)


def _beginning(value: object) -> str:
    """A value's first characters."""
    if isinstance(value, dict | list):
        value = type(value)(list(value)[:8]) if isinstance(value, list) else dict(list(value.items())[:8])
    elif isinstance(value, str):
        value = value[:_LONGEST_VALUE]
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
