"""A progress bar inside compiled loops, with the time left."""

from __future__ import annotations

from typing import Any

import jax

from diffjax.levels import Array

_bars: dict[str, Any] = {}


def tick(index: Array, count: int, name: str = "sampling") -> None:
    """Show that ``index + 1`` of ``count`` steps are done; call it inside a loop body.

    The index must not be batched: then it ticks once a step under vmap, and showing a step again (once per device)
    changes nothing.  Needs tqdm.
    """
    jax.debug.callback(lambda i: _show(int(i) + 1, count, name), index)


def _show(done: int, count: int, name: str) -> None:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm; install it or pass progress=False.") from error

    bar = _bars.get(name)
    if bar is None or done == 1 < bar.n:
        bar = _bars[name] = tqdm(total=count, desc=name)
    bar.update(max(0, done - bar.n))
    if done == count:
        _bars.pop(name).close()
