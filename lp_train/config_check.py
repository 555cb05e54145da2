"""Reads plain YAML values into typed fields and collects what is wrong, instead of stopping at the first mistake."""

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

_TYPES: dict[Any, tuple[str, str]] = {  # in words, and an example
    str: ("text", "name"),
    int: ("an integer", "8"),
    float: ("a number", "1.0"),
    bool: ("true or false", "true"),
    type(None): ("null", "null"),
    dict: ("a mapping", "{key: value}"),
    list: ("a list", "[a, b]"),
}
_SHOWN = 6  # names of a long list of choices
_WRONG: Any = object()


class Reader:
    """Reads one configuration. Every method notes its errors in ``errors``, one line each, and reads on.

    ``known`` holds all dotted keys of the schema; a key that stands in the wrong section is found there.
    """

    def __init__(self, known: Collection[str] = ()) -> None:
        self.errors: list[str] = []
        self.known = known

    def dataclass(self, cls: type, raw: Any, where: str) -> Any:
        """An instance of the dataclass ``cls`` from a mapping; where a value is wrong, its default stands in."""
        fields, read = {field.name: field for field in dataclasses.fields(cls)}, {}
        if (given := self._mapping(raw, where, ", ".join(fields))) is not None:
            for name, field in fields.items():
                if name not in given and field.default is field.default_factory is dataclasses.MISSING:
                    shown = field.metadata.get("example", "{key: value}")
                    self.errors.append(f"{_join(where, name)}: missing; it is required, for example {shown}")
            self.unknown(given, fields, where)
            read = self._values(given, typing.get_type_hints(cls), where)
        return cls(**{name: read.get(name, _default(field)) for name, field in fields.items()})

    def options(
        self, library: type, raw: Any, where: str, extra: Mapping[str, Any], owned: Mapping[str, str]
    ) -> dict[str, Any]:
        """Those of ``raw`` that are fields of the dataclass ``library`` or in ``extra`` (name: type), nulls left out.

        A name in ``owned`` is refused with the reason given there.
        """
        given = self._mapping(raw, where, f"{library.__name__}'s fields") or {}
        hints = {n: h for n, h in {**typing.get_type_hints(library), **extra}.items() if n not in owned}
        for name in (n for n in given if n in owned):
            self.errors.append(f"{where}.{name}: not set here: {owned[name]}; remove it")
        self.unknown([n for n in given if n not in owned], hints, where)
        return {n: v for n, v in self._values(given, hints, where).items() if v is not None}

    def unknown(self, keys: Iterable[Any], allowed: Collection[str], where: str) -> None:
        """Notes each key that is not allowed, with the nearest one that is."""
        for key in keys:
            if key not in allowed:
                self.errors.append(f"{_join(where, key)}: unknown key; {self._nearest(str(key), allowed, where)}")

    def _nearest(self, key: str, allowed: Collection[str], where: str) -> str:
        near = [_join(where, k) for k in difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)]
        near = near or [k for k in self.known if k.rpartition(".")[2] == key]
        near = near or difflib.get_close_matches(_join(where, key), self.known, n=1, cutoff=0.6)
        return f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(sorted(allowed))}"

    def _mapping(self, raw: Any, where: str, expected: str) -> Mapping | None:
        if raw is not None and not isinstance(raw, Mapping):
            self.errors.append(f"{where} {raw!r}: expected a mapping of {expected}")
            return None
        return raw or {}  # null: a section of comments only

    def _values(self, given: Mapping, hints: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Those of the given values that are of the annotated type."""
        read = {name: self._value(hints[name], given[name], _join(where, name)) for name in given if name in hints}
        return {name: value for name, value in read.items() if value is not _WRONG}

    def _value(self, hint: Any, value: Any, where: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.dataclass(typing.cast(type, hint), value, where)
        items = [get_args(h)[0] for h in alternatives(hint) if get_origin(h) is list]
        if items and dataclasses.is_dataclass(items[0]) and isinstance(value, list):
            return [self.dataclass(typing.cast(type, items[0]), v, f"{where}.{i}") for i, v in enumerate(value)]
        if any(_fits(h, value) for h in alternatives(hint)):
            return value
        given = "null" if value is None else repr(value)
        expected = " or ".join(_describe(h, value) for h in alternatives(hint))
        self.errors.append(f"{where} {given}: expected {expected}, for example {_example(hint)}")
        return _WRONG


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, or the one type. An enum is a literal of its values, also where the union has text."""
    types_ = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    enums = [h for h in types_ if isinstance(h, type) and issubclass(h, enum.Enum)]
    literals = [Literal[tuple(member.value for member in h)] for h in enums]
    return [*literals, *(h for h in types_ if h not in enums and not (enums and h is str))]


def _fits(hint: Any, value: Any) -> bool:
    """Whether a YAML value is of a type; types that no YAML value can be checked against fit."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == v and type(value) is type(v) for v in get_args(hint))
    if origin in (list, dict):
        elements = value if origin is list else list(value.values()) if isinstance(value, dict) else []
        of_element = alternatives(get_args(hint)[-1])
        return isinstance(value, origin) and all(any(_fits(h, v) for h in of_element) for v in elements)
    if hint in _TYPES:
        number = (int, float) if hint is float else hint
        return isinstance(value, number) and (hint is bool or not isinstance(value, bool))
    return not dataclasses.is_dataclass(hint)


def _describe(hint: Any, value: Any) -> str:
    """A type in words. Of many choices, those nearest to the wrong ``value``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        names = [str(v) for v in inner]
        near = difflib.get_close_matches(str(value), names, n=_SHOWN, cutoff=0)
        return f"one of {', '.join(names if len(names) <= _SHOWN else near)}" if len(names) > 1 else names[0]
    if origin is list:
        return "a list of " + {str: "texts", int: "integers"}.get(inner[0], "lists")
    return _TYPES.get(origin or hint, ("another value", ""))[0]


def _example(hint: Any) -> str:
    """A value of the annotated type, as YAML."""
    first = next((h for h in alternatives(hint) if h is not type(None)), hint)
    if get_origin(first) is Literal:
        return str(get_args(first)[0])
    return _TYPES.get(get_origin(first) or first, ("", "null"))[1]


def _default(field: dataclasses.Field) -> Any:
    """The field's default; None for a required field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
