"""Files of others checked by pydantic: what breaks a schema is one line that names the field."""

import json
import pathlib
import reprlib
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from spa_jax.errors import UserError

T = TypeVar("T")
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Size = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


class Schema(pydantic.BaseModel):
    """Base of what a file must say; what it says beyond that is passed over."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


def read(schema: type[T], path: pathlib.Path, *, remedy: str) -> T:
    """A file's JSON as the type that it must be of.

    Args:
      schema: as in `check`.
      path: the file.
      remedy: what to do about a file that is not as it should be.

    Raises:
      UserError: it cannot be read, is not JSON, or says something else; in one line.
    """
    try:
        return check(schema, json.loads(path.read_text(encoding="utf-8")), path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def check(schema: type[T], value: Any, where: object) -> T:
    """A value of others as the type that it must be of.

    Args:
      schema: a `Schema`, or any other type that pydantic knows.
      value: as JSON gives it.
      where: its file, for the message.

    Raises:
      UserError: names the file, the first field that is wrong, and what it may be.
    """
    try:
        return pydantic.TypeAdapter(schema).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {said(error)}") from error


def printable(text: str) -> str:
    """A text of a file as a message shows it: in one line."""
    return text if text.isprintable() else repr(text)[1:-1]


def said(error: pydantic.ValidationError) -> str:
    """The first breach in one line: the field, its value, and what it may be."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(printable(str(part)) for part in first["loc"])
    if first["type"] == "missing":
        return f"{field} is missing"
    reason = first["msg"].removeprefix("Value error, ")
    found = reprlib.repr(first["input"])
    reason = reason.replace("Input should be", "it must be")
    return f"{field}={found}: {reason}" if field else f"{found}: {reason}"
