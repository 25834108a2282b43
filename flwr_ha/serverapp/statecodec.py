"""Turn what a strategy remembers into JSON and arrays, and back: see `flwr_ha.serverapp.state`."""

from __future__ import annotations

import functools
import logging
import random
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from flwr_ha.errors import ConfigError
from flwr_ha.serverapp.arrays import pack, unpack

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

_PLAIN = (bool, int, float, str, types.NoneType)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, functools.partial)
_DICTS = {dict: "dict", OrderedDict: "ordered", Counter: "counter", defaultdict: "default"}
_BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
_TAG = "$"  # the one key of an encoded value that is not plain JSON


class _UncapturableError(Exception):
    """The value is of a kind that is not kept."""

    def __init__(self, value: object) -> None:
        super().__init__(f"a {type(value).__name__}")
        self.is_code = isinstance(value, _CODE)


def _has_state_dict(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class Encoder:
    """Turn values into JSON, and put their arrays aside.

    Parameters
    ----------
    arrays : dict of str to ndarray
        Gets the arrays.
    is_copied : bool
        Copy those that the strategy could change in place.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], is_copied: bool) -> None:
        self._arrays = arrays
        self._is_copied = is_copied

    def strategy(self, strategy: Strategy, path: str) -> dict[str, Any]:
        """Return what a strategy remembers; ConfigError where its own ``state_dict()`` holds what cannot be kept."""
        if _has_state_dict(strategy):
            try:
                return {"own": self.value(strategy.state_dict(), f"{path}own")}  # type: ignore[attr-defined]
            except _UncapturableError as error:
                raise ConfigError(f"{type(strategy).__name__}.state_dict() holds {error}: it cannot be kept") from error
        kept: dict[str, Any] = {}
        for name, value in vars(strategy).items():
            before = set(self._arrays)
            try:
                kept[name] = self.value(value, f"{path}{name}")
            except _UncapturableError as error:
                for key in self._arrays.keys() - before:
                    del self._arrays[key]
                if not error.is_code:
                    _warn_once(type(strategy).__name__, name, str(error))
        return {"kept": kept, "names": sorted(vars(strategy))}

    def value(self, value: Any, path: str) -> Any:
        """Return a value as JSON; `path` names its arrays."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, list) and type(value) is list:
            return [self.value(item, f"{path}.{index}") for index, item in enumerate(value)]
        kind, body = self._tagged(value, path)
        return {_TAG: kind, "value": body}

    def _tagged(self, value: Any, path: str) -> tuple[str, Any]:
        match value:
            case np.ndarray() if not value.dtype.hasobject:
                return "array", self._put(value, path, is_shared=True)
            case np.generic():
                return "scalar", self._put(np.asarray(value), path)
            case bytes():
                return "bytes", self._put(np.frombuffer(value, np.uint8) if value else np.zeros(0, np.uint8), path)
            case ArrayRecord():
                views, foreign = pack(value)
                return "arrays", [[[k, self._put(v, f"{path}.{k}")] for k, v in views.items()], foreign]
            case ConfigRecord():
                return "config", self._pairs(value, path)
            case MetricRecord():
                return "metrics", self._pairs(value, path)
            case dict() if type(value) in _DICTS:
                return _DICTS[type(value)], self._pairs(value, path)
            case tuple() if type(value) is tuple:
                return "tuple", self.value(list(value), path)
            case set() | frozenset():
                items = sorted(value, key=lambda item: (type(item).__name__, repr(item)))
                return type(value).__name__, self.value(items, path)
            case _:
                return self._object(value, path)

    def _object(self, value: Any, path: str) -> tuple[str, Any]:
        match value:
            case Strategy():
                return "strategy", self.strategy(value, f"{path}.")
            case np.random.Generator():
                return "generator", self.value(dict(value.bit_generator.state), path)
            case random.Random():
                return "random", self.value(value.getstate(), path)
            case _ if _has_state_dict(value) and not isinstance(value, type):
                return "object", self.value(value.state_dict(), path)
            case _:
                raise _UncapturableError(value)

    def _pairs(self, items: Mapping[Any, Any], path: str) -> list[Any]:
        return [[self.value(k, f"{path}.k{i}"), self.value(v, f"{path}.{k}")] for i, (k, v) in enumerate(items.items())]

    def _put(self, array: NDArray[Any], path: str, *, is_shared: bool = False) -> str:
        while path in self._arrays:  # keys may hold dots
            path += "'"
        self._arrays[path] = array.copy() if is_shared and self._is_copied else array
        return path


_warned: set[tuple[str, str]] = set()


def _warn_once(owner: str, name: str, what: str) -> None:
    if (owner, name) in _warned:
        return
    _warned.add((owner, name))
    logger.warning(
        "%s.%s holds %s, which is not kept over a failover: define state_dict() and load_state_dict() if it matters",
        owner,
        name,
        what,
    )


class Decoder:
    """Turn encoded values back, in place where an object must stay the same.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        What an `Encoder` has put aside.
    is_exact : bool
        Also remove attributes that a strategy did not have then.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], is_exact: bool) -> None:
        self._arrays = arrays
        self._is_exact = is_exact
        self._attribute = ""  # that is being given back

    def into(self, strategy: Strategy, plain: Mapping[str, Any]) -> None:
        """Give a strategy back what `Encoder.strategy` returned of it."""
        if "own" in plain:
            strategy.load_state_dict(self.value(plain["own"]))  # type: ignore[attr-defined]
            return
        attributes = vars(strategy)
        for name in set(attributes) - set(plain["names"]) if self._is_exact else ():
            del attributes[name]
        for name, encoded in plain["kept"].items():
            self._attribute = f"{type(strategy).__name__}.{name}"
            setattr(strategy, name, self.value(encoded, attributes.get(name)))

    def value(self, encoded: Any, present: Any = None) -> Any:
        """Return what `Encoder.value` was given; `present` is the object that may have to stay."""
        if isinstance(encoded, list):
            olds = present if isinstance(present, list) and len(present) == len(encoded) else [None] * len(encoded)
            return [self.value(item, old) for item, old in zip(encoded, olds, strict=True)]
        if not isinstance(encoded, dict):
            return encoded
        return self._untagged(encoded[_TAG], encoded["value"], present)

    def _untagged(self, kind: str, body: Any, present: Any) -> Any:
        match kind:
            case "array":
                return np.array(self._arrays[body], copy=True)
            case "scalar":
                return self._arrays[body][()]
            case "bytes":
                return self._arrays[body].tobytes()
            case "arrays":
                return unpack({name: self._arrays[path] for name, path in body[0]}, body[1])
            case "config":
                return ConfigRecord(self._pairs(body))
            case "metrics":
                return MetricRecord(self._pairs(body))
            case "dict" | "ordered" | "counter" | "default":
                return self._dict(kind, self._pairs(body, present if isinstance(present, dict) else None), present)
            case "tuple":
                return tuple(self.value(body, list(present) if isinstance(present, tuple) else None))
            case "set" | "frozenset":
                return (set if kind == "set" else frozenset)(self.value(body))
            case _:
                return self._object(kind, body, present)

    def _dict(self, kind: str, pairs: dict[Any, Any], present: Any) -> dict[Any, Any]:
        match kind:
            case "ordered":
                return OrderedDict(pairs)
            case "counter":
                return Counter(pairs)
            case "default":  # what makes its values is code: the strategy's own
                return defaultdict(present.default_factory if isinstance(present, defaultdict) else None, pairs)
            case _:
                return pairs

    def _object(self, kind: str, body: Any, present: Any) -> Any:
        match kind:
            case "generator":
                state = self.value(body)
                made = present or np.random.Generator(_BIT_GENERATORS[state["bit_generator"]]())
                made.bit_generator.state = state
                return made
            case "random":
                made = present or random.Random()  # noqa: S311  # the strategy's choice
                made.setstate(self.value(body))
                return made
            case "strategy" | "object" if present is None:
                logger.warning(
                    "%s was made during training, and what it held is not given back: make it in __init__, or define"
                    " state_dict() and load_state_dict()",
                    self._attribute,
                )
                return None
            case "strategy":
                self.into(present, body)
            case "object":
                present.load_state_dict(self.value(body))
            case _:
                raise KeyError(kind)
        return present

    def _pairs(self, body: Any, present: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
        pairs = ((self.value(key), encoded) for key, encoded in body)
        return {key: self.value(encoded, (present or {}).get(key)) for key, encoded in pairs}
