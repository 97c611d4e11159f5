"""Results of an experiment's parts on disk: JSON, and arrays beside it; written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def write(file: Path, result: Any, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write a result, with the configuration that it was made with.

    Raises TypeError for what is neither JSON nor an array of numbers.
    """
    arrays: dict[str, np.ndarray] = {}
    encoded = _encode(result, arrays)
    text = json.dumps({**record, "config": dict(config), "arrays": len(arrays), "result": encoded})
    file.parent.mkdir(parents=True, exist_ok=True)
    if arrays:
        draft = file.with_suffix(".tmp.npz")
        with draft.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
            _flush(stream)
        draft.replace(file.with_suffix(".npz"))
    draft = file.with_suffix(".tmp")  # the arrays are there before the record that says so
    with draft.open("w") as stream:
        stream.write(text + "\n")
        _flush(stream)
    draft.replace(file)


def read(file: Path, config: Mapping[str, Any]) -> tuple[Any] | None:
    """The result, in a tuple; None if there is none that was made with this configuration."""
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    if record["config"] != config:
        return None
    arrays: dict[str, np.ndarray] = {}
    if record["arrays"]:
        try:
            with np.load(file.with_suffix(".npz"), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored}
        except FileNotFoundError:
            return None
    return (_decode(record["result"], arrays),)


def plain(result: Any) -> Any:
    """A result as it comes back from disk."""
    arrays: dict[str, np.ndarray] = {}
    encoded = json.loads(json.dumps(_encode(result, arrays)))
    return _decode(encoded, arrays)


def jsonable(value: Any) -> Any:
    """Options as JSON values: paths and everything unknown as text."""
    return json.loads(json.dumps(value, default=str))


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """JSON values; what JSON cannot tell apart is an object with one key that starts with "$"."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, jax.Array)):
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"an array of a part's result must be of numbers, got dtype {array.dtype}.")
        name = f"a{len(arrays)}"
        arrays[name] = array
        return {"$array": name}
    if isinstance(value, dict):
        pairs = [(key, _encode(item, arrays)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$items": [[_encode(key, arrays), item] for key, item in pairs]}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"$tuple": [_encode(item, arrays) for item in value]}
    if isinstance(value, list):
        return [_encode(item, arrays) for item in value]
    named = "a NamedTuple" if hasattr(value, "_fields") else "a dataclass" if dataclasses.is_dataclass(value) else ""
    kind = f"{named or 'an object'} of type {type(value).__name__}"
    raise TypeError(f"a part's result must be dicts, lists, tuples, numbers, strings and arrays, got {kind}.")


def _decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "$array" in value:
        return arrays[value["$array"]]
    if "$tuple" in value:
        return tuple(_decode(item, arrays) for item in value["$tuple"])
    if "$items" in value:
        return {_decode(key, arrays): _decode(item, arrays) for key, item in value["$items"]}
    return {key: _decode(item, arrays) for key, item in value.items()}


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
