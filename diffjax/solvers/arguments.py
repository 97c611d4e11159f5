"""Arguments that may be a number or a function: tau of the level, phi of the noise-to-signal ratio, and the like.

Either becomes a value (a pytree) that is called: a number is a leaf, so that changing it compiles nothing new, a
function is static and compared by identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.levels import Array, is_traced, namespace, static, value


@value
class Constant:
    number: Array

    def __repr__(self) -> str:
        return repr(self.number)

    def __call__(self, argument: Any) -> Array:
        del argument
        return self.number


@value
class Function:
    function: Callable = static()

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))

    def __call__(self, argument: Any) -> Array:
        """The function's value, as float64 NumPy where the argument is and nothing is traced."""
        result = self.function(argument)
        if namespace(argument) is np and not is_traced(result):
            return np.asarray(result, np.float64)
        return result


def number_or_function(name: str, given: Any, low: float = 0.0, high: float = np.inf) -> Any:
    """``given`` as a value to be called; ValueError unless it is callable or a finite number in [low, high]."""
    if callable(given):
        return Function(given)
    number(name, given, low, high)
    return Constant(given)


def number(name: str, given: Array, low: float = 0.0, high: float = np.inf) -> None:
    """Raise ValueError unless ``given`` is traced or a finite number in [low, high]."""
    if is_traced(given):
        return
    if not (isinstance(given, float | int | np.number | np.ndarray) or hasattr(given, "dtype")) or np.ndim(given) != 0:
        raise ValueError(f"{name} must be a number, got {given!r}.")
    if not (low <= given <= high and np.isfinite(given)):
        limits = f"in [{low}, {high}]" if np.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} must be a finite number {limits}, got {given!r}.")


def positive(name: str, given: Array) -> None:
    """Raise ValueError unless ``given`` is traced or all of it is above 0."""
    if not is_traced(given) and not np.all(np.asarray(given) > 0):
        raise ValueError(f"{name} must be above 0, got {given!r}.")


def integer(name: str, given: Any, low: int, high: int) -> None:
    """Raise ValueError unless ``given`` is an integer in [low, high]."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or not low <= given <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {given!r}.")


def choice(name: str, given: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``given`` is one of ``allowed``."""
    if given not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {given!r}.")


def is_zero(given: Any) -> bool:
    """Whether an argument is known to be 0, so that a method without noise can be built."""
    given = given.number if isinstance(given, Constant) else given
    return not isinstance(given, Function) and not is_traced(given) and bool(np.all(given == 0))
