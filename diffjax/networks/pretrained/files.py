"""Weights on disk: a `config.json` and safetensors, as diffusers writes them, into the parameters of a network.

Only safetensors are read: a file that is unpickled (`.bin`, `.ckpt`, `.pt`) runs whatever code is in it.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
# names that older files have for the projections of attention on pixels
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")


def folder(source: str | os.PathLike, subfolder: str = "") -> Path:
    """A local folder, or the local copy of a repository "owner/name" of the Hub if `huggingface_hub` is installed.

    Raises FileNotFoundError if there is neither: says which folder was looked for.
    """
    path = Path(source)
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(source)):
        try:
            from huggingface_hub import snapshot_download  # type: ignore[import-not-found]
        except ImportError:
            raise FileNotFoundError(
                f"there is no folder {path.absolute()}, and to fetch {os.fspath(source)!r} from the Hub "
                "huggingface_hub must be installed"
            ) from None
        path = Path(snapshot_download(os.fspath(source), allow_patterns=["*.json", "*.safetensors"]))
    if not (path / subfolder).is_dir():
        raise FileNotFoundError(f"there is no folder {(path / subfolder).absolute()}")
    return path / subfolder


def configuration(path: Path, name: str, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises FileNotFoundError if the folder has no such file, ValueError if it is no JSON object or of none of `kinds`:
    says what was expected and found.
    """
    file = path / name
    if not file.is_file():
        found = sorted(entry.name for entry in path.iterdir())
        raise FileNotFoundError(f"expected {name} in {path.absolute()}, found {found}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    if kinds and config.get("_class_name") not in kinds:
        raise ValueError(f"{file} must be of one of {list(kinds)}, found {config.get('_class_name')!r}")
    return config


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The names and tensors of a folder's safetensors, one after the other, of all shards.

    Raises FileNotFoundError if there are none, and ValueError for several sets of weights, a shard that is missing, or
    weights that only code could read.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise ImportError("to read published weights install safetensors: pip install diffjax[pretrained]") from None
    for file in _files(path):
        with safe_open(file, framework="flax") as opened:
            for name in opened.keys():
                today = OLD.sub(lambda found: f"{found[1]}.{RENAMED[found[2]]}.", name)
                yield today, np.asarray(opened.get_tensor(name))


def _files(path: Path) -> list[Path]:
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{path.absolute()} has several sets of weights, {[i.name for i in indices]}: keep one")
    if indices:
        shards = sorted({str(shard) for shard in json.loads(indices[0].read_text())["weight_map"].values()})
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise FileNotFoundError(f"{indices[0].name} names shards that {path.absolute()} lacks: {missing}")
        return [path / shard for shard in shards]
    found = sorted(path.glob("*.safetensors"))
    preferred = [file for file in found if not re.search(r"\.(fp16|bf16|ema|non_ema)\.", file.name)]
    found = preferred or found
    if len(found) == 1:
        return found
    if found:
        raise ValueError(f"{path.absolute()} has several sets of weights, {[file.name for file in found]}: keep one")
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{path.absolute()} has weights only as {pickled}, which are not read because reading them can run code: "
            "convert them to safetensors where you trust them"
        )
    raise FileNotFoundError(
        f"expected a .safetensors file in {path.absolute()}, found {sorted(file.name for file in path.iterdir())}"
    )


def filled(path: Path, abstract: PyTree, dtype: Any = jnp.float32) -> PyTree:
    """Parameters in the shapes of `abstract`, nested dictionaries, from the tensors of a folder.

    Raises ValueError if tensors are missing, left over or of another shape: names them, with what was expected.
    """
    expected = {
        jax.tree_util.keystr(where, simple=True, separator="."): leaf
        for where, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    found, problems = {}, []
    for name, tensor in tensors(path):
        stem, _, kind = name.rpartition(".")
        places = [place for place in _places(stem, kind) if place in expected]
        if not places:
            problems.append(f"{name}: expected no such tensor, found {list(tensor.shape)}")
            continue
        (place,) = places
        moved = _layout(place, tensor, len(expected[place].shape))
        if moved.shape != expected[place].shape:
            wanted = _stored(place, expected[place].shape)
            problems.append(f"{name}: expected {wanted}, found {list(tensor.shape)}")
            found[place] = None
        else:
            found[place] = jnp.asarray(moved, dtype)
    missing = [name for name in expected if name not in found]
    problems += [f"{_name(n)}: expected {_stored(n, expected[n].shape)}, found none" for n in missing]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the weights in {path.absolute()} do not fit config.json: {'; '.join(problems[:8])}{more}")
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in expected])


def _places(stem: str, kind: str) -> list[str]:
    """The parameters that a tensor may be."""
    names = {"weight": ("kernel", "scale", "embedding", "weight"), "bias": ("bias",)}.get(kind, (kind,))
    return [f"{stem}.{name}" if stem else name for name in names]


def _name(place: str) -> str:
    """The name on disk of a parameter."""
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", place)


def _layout(place: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    """A tensor in the layout of a parameter: (out, in) to (in, out), (out, in, h, w) to (h, w, in, out)."""
    if not place.endswith(".kernel"):
        return tensor
    if rank == 2 and tensor.ndim in (3, 4) and set(tensor.shape[2:]) == {1}:
        tensor = tensor.reshape(tensor.shape[:2])  # a convolution with a kernel of one pixel
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(tensor.ndim)
    return tensor if axes is None else tensor.transpose(axes)


def _stored(place: str, shape: tuple[int, ...]) -> list[int]:
    """The shape on disk of a parameter."""
    if not place.endswith(".kernel"):
        return list(shape)
    return [shape[-1], shape[-2], *shape[:-2]]
