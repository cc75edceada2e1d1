"""Frozen dataclasses to plain JSON values and back, strictly: every field is there, no other is, types are right."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

T = TypeVar("T")


class PlainError(Exception):
    """A value that is not what its place wants; the text is `<place>: got X, want Y`."""


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, dtypes to their names."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def from_plain(kind: type[T], value: Any, place: str) -> T:
    """The dataclass `kind` in a dict of plain values. PlainError names the place that is wrong."""
    return _read(kind, value, place)


def _read(kind: Any, value: Any, place: str) -> Any:
    origin = get_origin(kind)
    if origin is not None:
        return _read_generic(origin, get_args(kind), value, place)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, place)
    if kind is torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        return _want(isinstance(dtype, torch.dtype), dtype, "the name of a dtype", place)
    if kind is float:
        fits = type(value) is float or (type(value) is int and abs(value) < 2**1000)
        return float(_want(fits, value, "a number", place))
    return _want(type(value) is kind, value, kind.__name__, place)


def _read_generic(origin: Any, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
    if origin is Literal:
        return _want(value in arguments, value, f"one of {', '.join(map(repr, arguments))}", place)
    if origin is tuple:
        _want(isinstance(value, list), value, "a list", place)
        return tuple(_read(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _want(isinstance(value, dict), value, "an object", place)
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    assert origin in (Union, types.UnionType), origin  # X | None, the only union there is
    return None if value is None else _read(arguments[0], value, place)


def _read_dataclass(kind: Any, value: Any, place: str) -> Any:
    _want(isinstance(value, dict), value, "an object", place)
    wanted = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    if set(names) != value.keys():
        missing, extra = sorted(set(names) - value.keys()), sorted(value.keys() - set(names))
        raise PlainError(f"{place}: got extra {extra}, missing {missing}, want exactly {names}")
    return kind(**{name: _read(wanted[name], value[name], f"{place}.{name}") for name in names})


def _want(condition: bool, value: Any, want: str, place: str) -> Any:
    if not condition:
        text = repr(value)
        raise PlainError(f"{place}: got {text if len(text) < 60 else text[:60] + '...'}, want {want}")
    return value
