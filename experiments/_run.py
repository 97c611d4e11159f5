"""What every experiment does around its work: options, a folder that survives a kill, logs, progress.

    with _run.start(Options, arguments) as run:
        for name in run.over(names, "solvers"):
            curves[name] = run.part(f"curve of {name}", lambda: measure(run.options, name))

The folder ``--out`` holds ``config.json`` (the resolved options, versions and devices), ``log.jsonl`` and
``tensorboard/`` (the same scalars), and ``parts/``: every finished part's result.  A run that was killed, by whatever
signal, goes on with ``--resume``: finished parts are read back, the part that was cut off is made again.  Nothing that
is read back can execute code (JSON, and NumPy arrays without pickle).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import platform
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import jax
import tyro
from tensorboardX import SummaryWriter
from tqdm import tqdm

import diffjax
from experiments import _plots, _results

OptionsT = TypeVar("OptionsT")
Item = TypeVar("Item")
OWN = ("config.json", "log.jsonl", "tensorboard", "parts", "checkpoints", "metrics.jsonl", "training")


class Clock:
    """Seconds spent in each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - begin, 1)

    def __str__(self) -> str:
        return "seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in self.seconds.items())


class Run(Generic[OptionsT]):
    """A run of an experiment, as `start` makes it."""

    def __init__(self, name: str, options: OptionsT, out: Path, resume: bool, config: dict[str, Any]):
        self.name, self.options, self.out, self.resume, self.config = name, options, out, resume, config
        self.clock, self.leads, self.current = Clock(), jax.process_index() == 0, ""
        self.log_file, self.writer = out / "log.jsonl", None
        if self.leads:
            known = _scalars(self.log_file)
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
            self.writer = SummaryWriter(str(out / "tensorboard"))
            for tag, step, value in known:  # of an earlier go; made again, so that no step is there twice
                self.writer.add_scalar(tag, value, step)

    def __enter__(self) -> Run[OptionsT]:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._line({"finished": True, "seconds": self.clock.seconds})
        if self.writer is not None:
            self.writer.close()

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """``make()``, or what it returned in an earlier go of this run.

        The result is nested dicts, lists, tuples, numbers, strings, None and NumPy or JAX arrays.  What is returned is
        what was read back from disk, so that a resumed run sees nothing else than an undisturbed one.
        """
        file = self.out / "parts" / f"{slug(name)}.json"
        known = _results.read(file, self.config)
        if known is None:
            before, self.current, begin = self.current, name, time.perf_counter()
            result = make()
            self.current, seconds = before, round(time.perf_counter() - begin, 3)
            if not self.leads:
                return _results.plain(result)
            _results.write(file, result, self.config, {"part": name, "seconds": seconds})
            self._line({"part": name, "seconds": seconds})
            known = _results.read(file, self.config)
        assert known is not None
        return known[0]

    def over(self, items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
        """The items, with a bar that shows how many are done and the time left."""
        count = len(items) if total is None and isinstance(items, Sized) else total
        pace = 0.2 if sys.stderr.isatty() else 5.0  # in a log file every refresh is a line of its own
        yield from tqdm(items, title, count, disable=not self.leads, mininterval=pace, dynamic_ncols=True)

    def log(self, step: int, scalars: dict[str, Any] | None = None, **more: Any) -> None:
        """Scalars at a step, to ``log.jsonl`` and TensorBoard; of two lines of a step the later counts."""
        values = {tag: float(value) for tag, value in {**(scalars or {}), **more}.items()}
        self._line({"part": self.current, "step": int(step), **values})
        if self.writer is not None:
            for tag, value in values.items():
                self.writer.add_scalar(_tag(self.current, tag), value, int(step))

    def folder(self, name: str) -> Path:
        """A folder of the run's own, made if need be: for the checkpoints of one of several trainings."""
        path = self.out / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _line(self, record: dict[str, Any]) -> None:
        if self.leads:
            with self.log_file.open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")


def start(
    options: type[OptionsT],
    arguments: Sequence[str] | None = None,
    may_change: Sequence[str] = (),
    resolve: Callable[[OptionsT], OptionsT] = lambda options: options,
) -> Run[OptionsT]:
    """Read the command line, print and write the configuration, and open the folder of the run.

    Args:
        options: a frozen dataclass with a field ``out: Path``; its module's docstring is the help text.
        arguments: the command line (default: that of the process).
        may_change: fields in which a resumed run may differ; parts are then made again.
        resolve: what options that stand for others become (``--quick``).

    Raises SystemExit if the folder has a run and neither --resume nor --restart is given, and on --resume if that run
    is of another experiment or configuration: says what was found and what was asked for.
    """
    module = sys.modules[options.__module__]
    name = Path(inspect.getfile(options)).stem

    def resolved(options: Any, resume: bool = False, restart: bool = False) -> tuple[Any, bool, bool]:
        """Options, and how to treat an earlier run.

        Args:
            options: what the experiment is told.
            resume: Go on in the output folder: what is finished there is kept.
            restart: Begin again in the output folder: what an earlier run left there is removed.
        """
        return options, resume, restart

    resolved.__annotations__["options"] = Annotated[options, tyro.conf.arg(name="")]
    found, resume, restart = tyro.cli(
        resolved, args=arguments, prog=f"python -m experiments.{name}", description=module.__doc__
    )
    found: Any = resolve(found)
    out: Path = found.out
    config = _results.jsonable({k: v for k, v in dataclasses.asdict(found).items() if k != "out"})
    if resume and restart:
        raise SystemExit("--resume and --restart exclude each other.")
    _plots.headless()
    if jax.process_index() == 0:  # it decides for all: the others would find what it has just written
        if restart:
            _clear(out)
        elif resume:
            _same(out, name, config, may_change)
        elif _used(out):
            ways = "add --resume to go on, --restart to begin again, or choose another --out"
            raise SystemExit(f"{out} holds {_state(out)}: {ways}.")
        try:
            out.mkdir(parents=True, exist_ok=True)
            _write_config(out, name, config)
        except OSError as error:
            raise SystemExit(f"--out {out} cannot be written: {error}.") from error
        print(f"experiments.{name}" + "".join(f"\n  {field}: {value}" for field, value in config.items()))
        print(f"  out: {out}", flush=True)
    return Run(name, found, out, resume, config)


def slug(name: str) -> str:
    """A file's name for a part; two parts never share one."""
    plain = re.sub(r"[^\w.+=-]+", "-", name).strip("-.")
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"


def _write_config(out: Path, name: str, config: dict[str, Any]) -> None:
    record = {
        "experiment": name,
        "options": config,
        "versions": {"diffjax": diffjax.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
    draft = out / "config.tmp"
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(out / "config.json")


def _used(out: Path) -> bool:
    return (out / "config.json").exists() or (out / "checkpoints").exists()


def _state(out: Path) -> str:
    """What a refused folder holds, in words."""
    parts = len(list((out / "parts").glob("*.json")))
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    ended = bool(lines) and '"finished": true' in lines[-1]
    return "a finished run" if ended else f"a run that is not finished ({parts} parts are)"


def _same(out: Path, name: str, config: dict[str, Any], may_change: Sequence[str]) -> None:
    """SystemExit unless the folder's run, where there is one, is this one."""
    if not (out / "config.json").exists():
        return
    try:
        record = json.loads((out / "config.json").read_text())
        known, other = record["options"], record["experiment"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{out}/config.json cannot be read ({error!r}): --restart, or --out another.") from error
    if other != name:
        raise SystemExit(f"{out} holds a run of experiments.{other}, not of experiments.{name}: choose another --out.")
    absent = "(absent)"
    different = [
        f"{field} is {known.get(field, absent)} there and {config.get(field, absent)} here"
        for field in dict.fromkeys([*known, *config])
        if known.get(field, absent) != config.get(field, absent) and field not in may_change
    ]
    if different:
        raise SystemExit(
            f"{out} holds a run of another configuration: {'; '.join(different)}."
            " Give the same options, or --restart, or --out another."
        )


def _clear(out: Path) -> None:
    """Remove what runs leave behind, and nothing else."""
    if jax.process_index() == 0:
        for name in OWN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _tag(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _scalars(file: Path) -> list[tuple[str, int, float]]:
    """The scalars of a log, (tag, step, value) without doubles; a line that a kill cut off is removed from it."""
    if not file.exists():
        return []
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        os.truncate(file, len(kept))
    found = {}
    for line in kept.splitlines():
        record = json.loads(line)
        if "step" in record:
            for name, value in record.items():
                if name not in ("time", "part", "step"):
                    found[_tag(record["part"], name), record["step"]] = value
    return [(tag, step, value) for (tag, step), value in found.items()]
