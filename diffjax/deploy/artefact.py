"""A whole sampler exported ahead of time, as a folder that a process with nothing but jax runs.

    made = deploy.artefact(draw, params, condition=0, platforms=("cpu", "cuda"))
    made.save("served")

and there, without diffjax, Flax or the network's code (`jax.export` reads files by the package flatbuffers):

    import jax, jax.export, numpy as np
    with open("served/sampler.jax", "rb") as file:
        sampler = jax.export.deserialize(bytearray(file.read()))
    params = dict(np.load("served/params.npz"))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 16))
    x = sampler.call(params, keys, np.arange(16) % 10)

A sample depends on its key alone, so it is the one that the library draws with that key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from diffjax.levels import Array, Tree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SAMPLER, PARAMS, RECORD = "sampler.jax", "params.npz", "record.json"


class Artefact(NamedTuple):
    """An exported sampler; called as ``artefact(keys, condition)`` with B keys and a condition with leading axis B."""

    exported: export.Exported
    params: dict[str, np.ndarray] | None  # by dotted path; None where they are baked in
    record: dict[str, Any]

    def __call__(self, keys: Array, condition: Tree = None) -> Tree:
        """Samples of keys (typed, or their data), one each."""
        keys = jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
        told = () if condition is None else (condition,)
        return self.exported.call(*(() if self.params is None else (self.params,)), keys, *told)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``sampler.jax``, ``params.npz`` (unless baked in) and ``record.json``, which says what they take."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / SAMPLER).write_bytes(self.exported.serialize())
        if self.params is not None:
            np.savez(path / PARAMS, **self.params)  # type: ignore[arg-type]
        (path / RECORD).write_text(json.dumps(self.record, indent=1) + "\n")
        return path


def artefact(
    draw: Callable[..., Tree],
    params: Tree,
    condition: Tree = None,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu",),
    baked: bool = False,
) -> Artefact:
    """Export ``draw(params, key, condition) -> sample`` (or ``draw(params, key)``) of one sample, for a batch of them.

    Args:
        draw: draws one sample, for example through `diffjax.sample`; what it returns may be any tree (a `Sample` comes
            back as a dictionary of its fields).
        params: the network's parameters, nested dictionaries of arrays of one of NumPy's own types.
        condition: of one sample, as an example of shapes and types; None if ``draw`` takes none.
        batch: the number of samples; None leaves it open, so that the artefact takes any number.
        platforms: where it may run, among cpu, cuda, rocm and tpu; none of them has to be there now.
        baked: the parameters become constants of the program, whose file they are then in.

    Raises ValueError for an unknown platform, a batch below 1, or parameters that a file of arrays cannot hold.
    """
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ValueError(f"platforms must be among {PLATFORMS}, at least one, got {tuple(platforms)}.")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be a positive integer or None, got {batch!r}.")
    flat = _flat(params)
    kinds = {name: array.dtype.name for name, array in flat.items() if array.dtype.kind not in "biufc"}
    if kinds and not baked:
        raise ValueError(f"params must be of types that .npz files hold, or baked=True, got {kinds}.")
    structure, names = jax.tree.structure(params), list(flat)  # a dictionary comes back in alphabetical order
    size = export.symbolic_shape("batch")[0] if batch is None else batch

    def whole(flat: dict[str, Array], key_data: Array, *condition: Tree) -> Tree:
        tree = jax.tree.unflatten(structure, [flat[name] for name in names])
        drawn = jax.vmap(lambda key, *told: draw(tree, key, *told))(jax.random.wrap_key_data(key_data), *condition)
        return _plain(drawn)

    key_shape = jax.random.key_data(jax.random.key(0)).shape
    told = [] if condition is None else [condition]
    arguments = [
        jax.ShapeDtypeStruct((size, *key_shape), jnp.uint32),
        *jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *jnp.shape(leaf)), jnp.result_type(leaf)), told),
    ]
    if baked:
        program, taken = jax.jit(lambda *rest: whole(flat, *rest)), arguments
    else:
        program, taken = jax.jit(whole), [{n: _like(a) for n, a in flat.items()}, *arguments]
    exported = export.export(program, platforms=list(platforms))(*taken)
    record = {
        "platforms": list(platforms),
        "batch": batch if batch is not None else "any",
        "arguments": [str(leaf) for leaf in exported.in_avals] if baked else [str(leaf) for leaf in arguments],
        "params": None if baked else {name: [array.dtype.name, *array.shape] for name, array in flat.items()},
        "returns": [str(leaf) for leaf in exported.out_avals],
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
    }
    return Artefact(exported, None if baked else flat, record)


def load(folder: str | os.PathLike) -> Artefact:
    """An artefact from its folder, which holds array operations and arrays, and nothing that is unpickled.

    Raises FileNotFoundError for a file that is missing, ValueError for one that is no artefact.
    """
    path = Path(folder)
    missing = [name for name in (SAMPLER, RECORD) if not (path / name).is_file()]
    if missing:
        found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"expected {missing} in {path.absolute()}, found {found}")
    record = json.loads((path / RECORD).read_text())
    try:
        exported = export.deserialize(bytearray((path / SAMPLER).read_bytes()))
    except ImportError:
        raise
    except Exception as error:  # flatbuffers raises whatever its parsing runs into
        raise ValueError(f"{path / SAMPLER} is no exported sampler: {error!r}") from error
    params = None
    if record["params"] is not None:
        with np.load(path / PARAMS, allow_pickle=False) as stored:
            params = {name: stored[name] for name in stored}
        found = {name: [array.dtype.name, *array.shape] for name, array in params.items()}
        if found != record["params"]:
            differ = {n: (record["params"].get(n), found.get(n)) for n in {*found, *record["params"]}}
            wrong = {name: pair for name, pair in differ.items() if pair[0] != pair[1]}
            raise ValueError(f"{path / PARAMS} is not of this sampler; (expected, found): {wrong}")
    return Artefact(exported, params, record)


def _flat(params: Tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def _like(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _plain(tree: Any) -> Any:
    """A tree of dictionaries, tuples and lists: all that a file can say about a structure."""
    if hasattr(tree, "_asdict"):
        return {name: _plain(part) for name, part in tree._asdict().items() if part is not None}
    if isinstance(tree, dict):
        return {name: _plain(part) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_plain(part) for part in tree)
    leaves = jax.tree.leaves(tree)
    return leaves[0] if len(leaves) == 1 else tuple(leaves)
