"""The keys of a file, derived from a struct. One annotated field is one key:

    interval: Annotated[Seconds, "Time between two polls of one scope."] = 30.0

The type says how the value is written, the text what it means, the default what it is when the key is left out. With
`| None` the key may be null, which means left out. A struct as type is a mapping of its own keys, described by its
docstring. Beside each `Secret` there is a key `..._file`.
"""

from __future__ import annotations

import datetime
import enum
import functools
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from exporter.config.secret import Secret
from exporter.config.values import Boolean, Choice, File, Kind, SecretFile, SecretText, Text, Timezone


class Rule(enum.Enum):
    """What a list of values must be."""

    NOT_EMPTY = enum.auto()
    UNIQUE = enum.auto()
    INCREASING = enum.auto()


class Named(msgspec.Struct, frozen=True):
    """The name of a key that is not the name of its field."""

    name: str


NO_NULL = Named("")
"""Refuses null for a field that is None when its key is left out."""


class Items(msgspec.Struct, frozen=True):
    """A list of values."""

    kind: Kind | type[msgspec.Struct]
    rules: tuple[Rule, ...] = ()


class Key(msgspec.Struct, frozen=True):
    """One key: the field that it fills, what it takes, what it means, whether it may be null, its default.

    `default` is `msgspec.NODEFAULT` for a key that is required.
    """

    field: str
    kind: Kind | Items | type[msgspec.Struct]
    doc: str
    null: bool
    default: Any


@functools.cache
def keys(struct: type[msgspec.Struct]) -> dict[str, Key]:
    """The keys that a file may hold for `struct`, by name."""
    hints = get_type_hints(struct, include_extras=True)
    found: dict[str, Key] = {}
    for field in msgspec.structs.fields(struct):
        types, marks = _unwrapped(hints[field.name])
        kind = _kind(types, marks)
        doc = next((mark for mark in marks if isinstance(mark, str)), "")
        if isinstance(kind, type) and not doc:
            doc = kind.__doc__ or ""
        name = next((mark.name for mark in marks if isinstance(mark, Named) and mark.name), field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        key = Key(field.name, kind, doc, NoneType in types and NO_NULL not in marks, default)
        found[name] = key
        if isinstance(kind, SecretText):
            doc = f"File that holds {name}, instead of {name}; read again whenever it changes."
            found[f"{name}_file"] = Key(field.name, _SECRET_FILE, doc, key.null, default)
    return found


def json_schema(struct: type[msgspec.Struct], title: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file as users write it; `${VAR}` may stand for any text."""
    definitions: dict[str, Any] = {}
    root = _object(struct, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **root,
        "$defs": definitions,
    }


_SECRET_FILE = SecretFile()
_KINDS = {bool: Boolean(), str: Text(), Path: File(), Secret: SecretText(), datetime.timezone: Timezone()}
"""How values are written of which the type says all."""


def _unwrapped(hint: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The alternatives of a type, and what is written beside them in `Annotated`."""
    if hasattr(hint, "__metadata__"):
        types, marks = _unwrapped(hint.__origin__)
        return types, (*marks, *hint.__metadata__)
    if get_origin(hint) in (Literal, tuple) or not get_args(hint):
        return (hint,), ()
    alternatives = [_unwrapped(one) for one in get_args(hint)]
    return tuple(one for types, _ in alternatives for one in types), tuple(
        one for _, marks in alternatives for one in marks
    )


def _kind(types: tuple[Any, ...], marks: tuple[Any, ...]) -> Kind | Items | type[msgspec.Struct]:
    type_ = types[0]
    if get_origin(type_) is tuple:
        kind = _kind(*_unwrapped(get_args(type_)[0]))
        assert not isinstance(kind, Items)
        return Items(kind, tuple(mark for mark in marks if isinstance(mark, Rule)))
    for mark in marks:
        if isinstance(mark, Kind):
            return mark
    if get_origin(type_) is Literal:
        return Choice(*get_args(type_))
    return type_ if issubclass(type_, msgspec.Struct) else _KINDS[type_]


def _object(struct: type[msgspec.Struct], definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, key in keys(struct).items():
        schema = _value(key.kind, definitions)
        if key.null:
            schema = {"anyOf": [schema, {"type": "null"}]}
        properties[name] = {"description": key.doc, **schema}
        if key.default is msgspec.NODEFAULT:
            required.append(name)
        elif (
            not isinstance(key.default, msgspec.Struct) and (key.default is not None or key.null) and key.default != ""
        ):
            properties[name]["default"] = _written(key.kind, key.default)
    schema = {"type": "object", "description": struct.__doc__, "additionalProperties": False, "properties": properties}
    return {**schema, "required": required} if required else schema


def _value(kind: Kind | Items | type[msgspec.Struct], definitions: dict[str, Any]) -> dict[str, Any]:
    if isinstance(kind, Kind):
        return kind.schema()
    if isinstance(kind, Items):
        schema: dict[str, Any] = {"type": "array", "items": _value(kind.kind, definitions)}
        if Rule.NOT_EMPTY in kind.rules:
            schema["minItems"] = 1
        if {Rule.UNIQUE, Rule.INCREASING} & {*kind.rules}:
            schema["uniqueItems"] = True
        return schema
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _written(kind: Kind | Items | type[msgspec.Struct], value: Any) -> object:
    """A default as a user writes it."""
    if isinstance(kind, Items):
        return [_written(kind.kind, item) for item in value]
    return kind.write(value) if isinstance(kind, Kind) and value is not None else value
