"""Looking into traced programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
        for part in inner:
            if hasattr(part, "eqns"):
                yield from equations(part)
            elif hasattr(part, "jaxpr"):
                yield from equations(part.jaxpr)
