"""Checkpoints: everything a run needs to go on as if it had never stopped.

`folder/checkpoints/00000500/` holds, written by Orbax, the parameters, their moving average and the
optimiser's state, and as JSON the step, the random key, the state of the data's iterator, the
configuration and the network's architecture. No part of it is executable.

A checkpoint appears under its name only when all of it is on disk, so what is found is complete. It
also holds a checksum of every array, since a missing piece of an array file can read as zeros.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from diffjax.training.step import TrainState

PARTS = ("params", "ema", "optimiser")
Folder = str | os.PathLike


class Restored(NamedTuple):
    """A checkpoint: the state, the data iterator's state, and what was recorded beside it."""

    state: TrainState
    iterator: dict[str, Any] | None
    config: dict[str, Any]
    architecture: dict[str, Any] | None


class _Damaged(ValueError):
    """A checkpoint that cannot be read in full."""


def steps(folder: Folder) -> list[int]:
    """The steps of all complete checkpoints in a run's folder, in order; empty if there are none."""
    place = Path(folder) / "checkpoints"
    found = place.iterdir() if place.is_dir() else ()
    return sorted(int(path.name) for path in found if re.fullmatch(r"\d{8,}", path.name))


def save(
    folder: Folder,
    state: TrainState,
    *,
    iterator: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    architecture: dict[str, Any] | None = None,
    keep: int = 3,
) -> Path:
    """Write a checkpoint of `state` under its step, then remove all but the newest `keep`.

    Args:
        folder: the run's folder, made if need be.
        iterator: `get_state()` of the data's iterator.
        config, architecture: JSON objects kept beside the arrays.

    Returns:
        the checkpoint's folder.

    Raises:
        ValueError: keep < 1, or something beside the arrays is not JSON.
        OSError: the folder cannot be written.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    trees = {part: _flat(getattr(state, part)) for part in PARTS}
    record = {
        "step": int(state.step),
        "key": np.asarray(jax.random.key_data(state.key)).tolist(),
        "key_kind": str(jax.random.key_impl(state.key)),
        "iterator": iterator,
        "config": config or {},
        "architecture": architecture,
        "arrays": {part: {name: _shape(leaf) for name, leaf in tree.items()} for part, tree in trees.items()},
        "checksums": {part: {name: _checksum(leaf) for name, leaf in tree.items()} for part, tree in trees.items()},
    }
    try:
        json.dumps(record)
    except TypeError as error:
        raise ValueError(f"config, architecture and iterator state must be JSON: {error}") from None
    path = _path(folder, record["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _remove(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        # Plain gradient descent, for one, has no state to save.
        arrays = {part: ocp.args.StandardSave(tree) for part, tree in trees.items() if tree}
        writer.save(path, ocp.args.Composite(record=ocp.args.JsonSave(record), **arrays))
    if jax.process_index() == 0:
        for old in steps(folder)[:-keep]:
            _remove(_path(folder, old))
        for rest in path.parent.iterdir():  # what a killed run was writing or removing
            if not re.fullmatch(r"\d{8,}", rest.name):
                shutil.rmtree(rest, ignore_errors=True)
    return path


def restore(folder: Folder, like: TrainState, *, step: int | None = None) -> Restored:
    """Read a checkpoint into the structure, shapes, dtypes and devices of `like`.

    Args:
        folder: the run's folder.
        like: a state as `init` makes it.
        step: which checkpoint; None takes the newest that can be read, with a warning for any newer
            one that cannot.

    Raises:
        FileNotFoundError: no such folder, or no such checkpoint in it.
        ValueError: another architecture or optimiser, or nothing that can be read.
    """
    return _newest(folder, step, lambda path, record: _restore(path, record, like))


def weights(folder: Folder, like: PyTree, *, ema: bool = True, step: int | None = None) -> PyTree:
    """Only the parameters of a checkpoint, for sampling: their moving average, or the last ones.

    Args:
        folder: the run's folder.
        like: parameters of the same architecture, for structure, shapes and devices.
        ema, step: the average or the last parameters; which checkpoint, as for `restore`.

    Raises:
        FileNotFoundError, ValueError: as for `restore`.
    """
    part = "ema" if ema else "params"
    return _newest(folder, step, lambda path, record: _part(path, record, part, like))


def describe(folder: Folder, *, step: int | None = None) -> dict[str, Any]:
    """What is recorded beside the arrays: "step", "config", "architecture", "arrays", ...

    `networks.build(describe(folder)["architecture"], rngs)` makes the network that was trained.

    Raises:
        FileNotFoundError, ValueError: as for `restore`.
    """
    return _newest(folder, step, lambda path, record: record)


def _newest(folder: Folder, step: int | None, read: Any) -> Any:
    """`read(path, record)` of a checkpoint, or of the newest that is whole."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no run folder {Path(folder).absolute()}")
    known = steps(folder)
    if not known:
        raise FileNotFoundError(f"there is no complete checkpoint in {_path(folder, 0).parent}")
    if step is not None and step not in known:
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {folder}; there are {known}")
    wanted = [step] if step is not None else known[::-1]
    damage: list[str] = []
    for number in wanted:
        path = _path(folder, number)
        try:
            found = read(path, _record(path))
        except _Damaged as error:
            damage.append(str(error))
            continue
        for message in damage:
            warnings.warn(f"{message}; going back to step {number}", stacklevel=3)
        return found
    raise ValueError("no checkpoint can be read: " + "; ".join(damage))


def _record(path: Path) -> dict[str, Any]:
    if not (path / "record").is_dir():
        raise _Damaged(f"checkpoint {path} is damaged: it lacks its record")
    record = _read(path, "record", ocp.args.JsonRestore())
    missing = [part for part, arrays in record["arrays"].items() if arrays and not (path / part).is_dir()]
    if missing:
        raise _Damaged(f"checkpoint {path} is damaged: it lacks {missing}")
    return record


def _restore(path: Path, record: dict[str, Any], like: TrainState) -> Restored:
    parts = {part: _part(path, record, part, getattr(like, part)) for part in PARTS}
    data = np.asarray(record["key"], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(data), impl=record["key_kind"])
    step = jnp.asarray(record["step"], like.step.dtype)
    key, step = (jax.device_put(new, old.sharding) for new, old in ((key, like.key), (step, like.step)))
    state = TrainState(**parts, step=step, key=key)
    return Restored(state, record["iterator"], record["config"], record["architecture"])


def _part(path: Path, record: dict[str, Any], part: str, like: PyTree) -> PyTree:
    """One of the trees of arrays, compared with `like` first and with its checksums last."""
    wanted = _flat(like)
    _compare(path, part, {name: _shape(leaf) for name, leaf in wanted.items()}, record["arrays"][part])
    if not wanted:
        return like
    abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
    found = _read(path, part, ocp.args.StandardRestore(abstract))
    for name, expected in record["checksums"][part].items():
        if expected is not None and _checksum(found[name]) != expected:
            raise _Damaged(f"checkpoint {path} is damaged: {part} {name} is not what was written")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def _read(path: Path, item: str, args: Any) -> Any:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            found = reader.restore(path, ocp.args.Composite(**{item: args}))[item]
    except Exception as error:  # tensorstore, JSON and Orbax have no common error
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise _Damaged(f"checkpoint {path} is damaged: {item} cannot be read ({first})") from error
    if found is None:
        raise _Damaged(f"checkpoint {path} is damaged: {item} is empty")
    return found


def _compare(path: Path, part: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """ValueError that names the first differences between two sets of arrays."""
    differences = [f"{name}: expected {shape}, found none" for name, shape in expected.items() if name not in found]
    differences += [f"{name}: expected none, found {shape}" for name, shape in found.items() if name not in expected]
    differences += [
        f"{name}: expected {shape}, found {found[name]}"
        for name, shape in expected.items()
        if name in found and list(shape) != list(found[name])
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        kind = "optimiser" if part == "optimiser" else "architecture"
        raise ValueError(f"checkpoint {path} is of another {kind}, {part} differ: {'; '.join(differences[:3])}{more}")


def _path(folder: Folder, step: int) -> Path:
    return Path(folder).absolute() / "checkpoints" / f"{step:08d}"


def _remove(path: Path) -> None:
    """Remove a checkpoint so that it is either there in full or not there."""
    if jax.process_index() == 0:
        doomed = path.with_name(f"removed-{path.name}-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, whatever containers they are in."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.asarray(leaf) for path, leaf in leaves}


def _shape(leaf: Any) -> list[Any]:
    return [leaf.dtype.name, *leaf.shape]


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _checksum(leaf: jax.Array) -> int | None:
    """CRC-32 of the bytes; None where other hosts hold a part of the array."""
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return None
    return zlib.crc32(np.ascontiguousarray(leaf).tobytes())
