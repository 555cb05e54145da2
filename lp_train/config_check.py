"""Reads plain YAML values into typed fields and collects what is wrong, instead of stopping at the first mistake."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    dict: "a mapping",
}
_EXAMPLES = {str: "name", int: 8, float: 0.001, bool: "true", dict: "{key: value}", list: "[a, b]"}


class Reader:
    """Reads one configuration. Every method notes its errors in ``errors``, one line each, and reads on.

    ``known`` holds all dotted keys of the schema; a key that stands in the wrong section is found there.
    """

    def __init__(self, known: Collection[str] = ()) -> None:
        self.errors: list[str] = []
        self.known = known

    def dataclass(self, cls: type, raw: Any, where: str) -> Any:
        """An instance of the dataclass ``cls`` from a mapping; where a value is wrong, its default stands in."""
        raw = {} if raw is None else raw  # a section of comments only
        if not isinstance(raw, Mapping):
            self.errors.append(f"{where} {raw!r}: expected a mapping of {', '.join(_field_names(cls))}")
            return cls(**{f.name: _default(f) for f in dataclasses.fields(cls)})
        self.unknown(raw, _field_names(cls), where)
        hints = typing.get_type_hints(cls)
        return cls(**{f.name: self._field(f, hints[f.name], raw, where) for f in dataclasses.fields(cls)})

    def options(
        self, library: type, raw: Any, where: str, extra: Mapping[str, Any], owned: Mapping[str, str]
    ) -> dict[str, Any]:
        """Those of ``raw`` that are fields of the dataclass ``library`` or in ``extra`` (name: type), nulls left out.

        A name in ``owned`` is refused with the reason given there.
        """
        raw = {} if raw is None else raw
        if not isinstance(raw, Mapping):
            self.errors.append(f"{where} {raw!r}: expected a mapping of {library.__name__}'s fields")
            return {}
        hints = {**typing.get_type_hints(library), **extra}
        allowed = [*(n for n in _field_names(library) if n not in owned), *extra]
        for name in (n for n in raw if n in owned):
            self.errors.append(f"{where}.{name}: not set here: {owned[name]}; remove it")
        self.unknown([n for n in raw if n not in owned], allowed, where)
        checked = {n: self._checked(hints[n], raw[n], f"{where}.{n}") for n in raw if n in allowed}
        return {n: v for n, v in checked.items() if v is not _WRONG and v is not None}

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

    def _field(self, field: dataclasses.Field, hint: Any, raw: Mapping, where: str) -> Any:
        name, default = _join(where, field.name), _default(field)
        shown = field.metadata.get("example") or example(hint, default)
        if field.name not in raw:
            if _required(field):
                self.errors.append(f"{name}: missing; it is required, for example {shown}")
            return default
        value = self._checked(hint, raw[field.name], name, shown)
        return default if value is _WRONG else value

    def _checked(self, hint: Any, value: Any, where: str, shown: str | None = None) -> Any:
        """The value, or _WRONG after noting what was expected; ``shown`` is the example given then."""
        if dataclasses.is_dataclass(hint):
            return self.dataclass(typing.cast(type, hint), value, where)
        inner = _dataclass_list(hint)
        if inner is not None and isinstance(value, list):
            return [self.dataclass(inner, v, f"{where}.{i}") for i, v in enumerate(value)]
        if fits(hint, value):
            return value
        given = "null" if value is None else repr(value)
        expected = f"{describe(hint, value)}, for example {shown or example(hint, None)}"
        self.errors.append(f"{where} {given}: expected {expected}")
        return _WRONG


_WRONG: Any = object()


def fits(hint: Any, value: Any) -> bool:
    """Whether a YAML value is of the annotated type; annotations that no YAML value can be checked against fit."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        alternatives = [h for h in get_args(hint) if not (h is str and _enums(hint))]  # an enum's names, not any text
        return any(fits(h, value) for h in alternatives)
    if origin is Literal:
        return any(value == v and type(value) is type(v) for v in get_args(hint))
    if origin in (list, dict):
        elements = value if origin is list else list(value.values()) if isinstance(value, dict) else []
        return isinstance(value, origin) and all(fits(get_args(hint)[-1], v) for v in elements)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in _NAMES:
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return not dataclasses.is_dataclass(hint)


def describe(hint: Any, value: Any = None) -> str:
    """An annotation in words: ``an integer or null``. Of many names, those nearest to the wrong ``value``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(h, value) for h in inner if not (h is str and _enums(hint)))
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        names = [str(v) for v in (inner if origin is Literal else (m.value for m in hint))]
        near = difflib.get_close_matches(str(value), names, n=_SHOWN, cutoff=0)
        return f"one of {', '.join(names if len(names) <= _SHOWN else near)}" if len(names) > 1 else names[0]
    if origin is list:
        return "a list of " + {str: "texts", int: "integers"}.get(inner[0], "lists")
    return _NAMES.get(hint) or ("a mapping" if origin is dict else "another value")


_SHOWN = 6


def example(hint: Any, default: Any) -> str:
    """The default where there is one, else a value of the annotated type, as YAML."""
    if default not in (None, [], {}):
        return str(default).lower() if isinstance(default, bool) else str(default)
    first = next((h for h in get_args(hint) if h is not type(None)), hint) if get_origin(hint) is not Literal else hint
    if get_origin(first) is Literal:
        return str(get_args(first)[0])
    if isinstance(first, type) and issubclass(first, enum.Enum):
        return str(next(iter(first)).value)
    return str(_EXAMPLES.get(get_origin(first) or first, "null"))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    """The field's default; None for a required field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _enums(hint: Any) -> list[type[enum.Enum]]:
    return [h for h in get_args(hint) if isinstance(h, type) and issubclass(h, enum.Enum)]


def _dataclass_list(hint: Any) -> type | None:
    """The dataclass X of ``list[X]`` or ``list[X] | None``."""
    for h in (hint, *get_args(hint)):
        if get_origin(h) is list and dataclasses.is_dataclass(get_args(h)[0]):
            return get_args(h)[0]
    return None


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
