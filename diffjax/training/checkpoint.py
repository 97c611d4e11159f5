"""Checkpoints: everything a run needs to go on as if it had never stopped.

`folder/checkpoints/00000500/` holds the parameters, their moving average, the optimiser's state and the loss's memory,
written by Orbax from all hosts, and `record.json`: the step, the random key, the state of the data's iterator, the
configuration and the network's architecture. No part of it is executable.

A checkpoint is written beside its place and renamed when all of it is on disk, so what is found under
its name is complete. The record lists every file with its size and checksum, which are compared before
anything is read: a missing piece of an array file can read as zeros.

A `Writer` writes while the training goes on: one checkpoint at a time; the next waits for it.
"""

import json
import os
import re
import shutil
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from diffjax import devices
from diffjax.training.step import TrainState

PARTS = ("params", "ema", "optimiser", "loss_state")
RECORD = "record.json"
REST = re.compile(r"(writing|removed)-\d{8,}|\d{8,}\.orbax-checkpoint-tmp")
Folder = str | os.PathLike


class Restored(NamedTuple):
    """A checkpoint: the state, the data iterator's state, and what was recorded beside it."""

    state: TrainState
    iterator: dict[str, Any] | None
    config: dict[str, Any]
    architecture: dict[str, Any] | None
    batch: list[Any] | None = None


class _Damaged(ValueError):
    """A checkpoint that cannot be read in full."""


def steps(folder: Folder) -> list[int]:
    """The steps of all complete checkpoints in a run's folder, in order; empty if there are none."""
    place = Path(folder) / "checkpoints"
    found = place.iterdir() if place.is_dir() else ()
    return sorted(int(path.name) for path in found if re.fullmatch(r"\d{8,}", path.name))


def save(folder: Folder, state: TrainState, **options: Any) -> Path:
    """Write a checkpoint of `state` under its step, and wait until it is there; `options` are those of `Writer.save`.

    Returns:
        the checkpoint's folder.
    """
    with Writer(folder) as writer:
        return writer.save(state, **options)


class Writer:
    """Writes checkpoints of one run beside the training; `with Writer(folder) as writer` waits for the last one.

    All hosts have one and call it alike. What fails is an `OSError` of the call that comes next, `check()` included;
    the checkpoint that could not be written leaves nothing behind, and those before it stay.
    """

    def __init__(self, folder: Folder):
        self.folder, self.orbax = folder, None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.path: Path | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        orderly = error is None or isinstance(error, SystemExit)
        try:
            self.wait()
        except OSError as failure:
            if orderly:
                raise
            warnings.warn(str(failure), stacklevel=2)
        finally:
            if self.orbax is not None:
                self.orbax.close()
        if orderly:
            devices.meet("the last checkpoint is in its place")

    def save(
        self,
        state: TrainState,
        *,
        iterator: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
        batch: list[Any] | None = None,
        keep: int = 3,
    ) -> Path:
        """Begin to write a checkpoint of `state` under its step; all but the newest `keep` are removed at the end.

        Checkpoints of later steps are removed too: they belong to a future that this run has left (or
        could not read), and must not be taken for its newest.

        Args:
            state: may be given to the next step at once (JAX keeps the memory that Orbax still reads).
            iterator: `get_state()` of the data's iterator.
            config, architecture, batch: JSON values kept beside the arrays.

        Returns:
            where the checkpoint will be.

        Raises:
            ValueError: keep < 1, or something beside the arrays is not JSON.
            OSError: the folder cannot be written, or the checkpoint before could not be.
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
            "batch": batch,
            "arrays": {part: {name: _shape(leaf) for name, leaf in tree.items()} for part, tree in trees.items()},
        }
        try:
            json.dumps(record)
        except TypeError as error:
            raise ValueError(f"config, architecture and iterator state must be JSON: {error}") from None
        self.wait()
        self.path = _path(self.folder, record["step"])
        draft = self.path.with_name(f"writing-{self.path.name}")
        if jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for rest in self.path.parent.iterdir():  # what a killed run was writing or removing
                if REST.match(rest.name):  # and nothing else that was put there: a copy called "best", say
                    shutil.rmtree(rest, ignore_errors=True)
        # Plain gradient descent, for one, has no state to save.
        arrays = {part: ocp.args.StandardSave(tree) for part, tree in trees.items() if tree}
        devices.meet("all save")
        if self.orbax is None:
            self.orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        try:
            self.orbax.save(draft, ocp.args.Composite(**arrays))
        except Exception as error:
            raise self._failed(draft, error) from error
        self.thread = threading.Thread(target=self._finish, args=(draft, self.path, record, keep), daemon=True)
        self.thread.start()
        return self.path

    def check(self) -> None:
        """OSError if the checkpoint that was being written could not be."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is in its place; OSError if it could not be written."""
        thread, self.thread = self.thread, None
        if thread is not None:
            thread.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _finish(self, draft: Path, path: Path, record: dict[str, Any], keep: int) -> None:
        """In the background: the rest of the arrays, the record, the name, and the end of older checkpoints."""
        try:
            assert self.orbax is not None
            self.orbax.wait_until_finished()
            if jax.process_index() == 0:
                _commit(draft, path, record)
                known = steps(self.folder)
                past = [number for number in known if number <= record["step"]]
                for number in known:
                    if number not in past[-keep:]:
                        _remove(_path(self.folder, number))
        except Exception as error:
            self.error = self._failed(draft, error)
            self.error.__cause__ = error

    def _failed(self, draft: Path, error: Exception) -> OSError:
        for rest in draft.parent.glob(f"{draft.name}*") if jax.process_index() == 0 else ():
            shutil.rmtree(rest, ignore_errors=True)  # a full disk needs the space
        known = steps(self.folder)
        newest = f"the newest is that of step {known[-1]}" if known else "there is none before it"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return OSError(f"checkpoint {self.path} could not be written, {newest}: {reason}")


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


def _commit(draft: Path, path: Path, record: dict[str, Any]) -> None:
    """Add the record, with sizes and checksums of all files, and give the folder its name."""
    files = sorted(file for file in draft.rglob("*") if file.is_file())
    record = {**record, "files": {str(file.relative_to(draft)): _checksum(file) for file in files}}
    record["checksum"] = zlib.crc32(json.dumps(record).encode())
    with (draft / RECORD).open("w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        _remove(path)
    draft.rename(path)


def _record(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, once every file has been compared with it."""
    try:
        record = json.loads((path / RECORD).read_text())
        whole = record.pop("checksum") == zlib.crc32(json.dumps(record).encode())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _Damaged(f"checkpoint {path} is damaged: {RECORD} cannot be read ({error})") from None
    if not whole:
        raise _Damaged(f"checkpoint {path} is damaged: {RECORD} is not what was written")
    for name, expected in record["files"].items():
        file = path / name
        if not file.is_file():
            raise _Damaged(f"checkpoint {path} is damaged: it lacks {name}")
        found = _checksum(file)
        if found[0] != expected[0]:
            raise _Damaged(f"checkpoint {path} is damaged: {name} has {found[0]} bytes of {expected[0]}")
        if found != expected:
            raise _Damaged(f"checkpoint {path} is damaged: {name} is not what was written")
    return record


def _restore(path: Path, record: dict[str, Any], like: TrainState) -> Restored:
    parts = {part: _part(path, record, part, getattr(like, part)) for part in PARTS}
    data = np.asarray(record["key"], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(data), impl=record["key_kind"])
    step = np.asarray(record["step"], like.step.dtype)
    key, step = (devices.placed(new, old.sharding) for new, old in ((key, like.key), (step, like.step)))
    state = TrainState(**parts, step=step, key=key)
    return Restored(state, record["iterator"], record["config"], record["architecture"], record.get("batch"))


def _part(path: Path, record: dict[str, Any], part: str, like: PyTree) -> PyTree:
    """One of the trees of arrays, after its shapes were compared with those of `like`."""
    wanted = _flat(like)
    _compare(path, part, {name: _shape(leaf) for name, leaf in wanted.items()}, record["arrays"].get(part, {}))
    if not wanted:
        return like
    abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(path, ocp.args.Composite(**{part: ocp.args.StandardRestore(abstract)}))[part]
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


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
        kind = {"optimiser": "optimiser", "loss_state": "loss"}.get(part, "architecture")
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


def _checksum(file: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size, code = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            size, code = size + len(block), zlib.crc32(block, code)
    return [size, code]
