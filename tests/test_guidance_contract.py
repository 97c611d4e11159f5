"""The contract of a guidance, over every public one, and over classifier-free guidance with every rule and schedule.

They are found: a guidance is a public function of `diffjax.guidance` whose first argument is ``denoise`` and that is
not told a state.  A new one is tested when it is imported there; if it needs an argument of a name not seen before, the
name goes into ARGUMENTS.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, processes, sample, solvers
from diffjax.catalogue import catalogue
from diffjax.levels import Array, Grid, Level, Tree, remembers, static, value

STEPS = 4
GRIDS = {
    "vp": grids.uniform(processes.vp(), STEPS),
    "ve": grids.karras(processes.edm(sigma_max=20.0), STEPS),
    "flow": grids.uniform(processes.flow(), STEPS),  # from alpha = 0 to sigma = 0
}
X = {"a": jnp.array([0.7, -1.1]), "b": jnp.array([[0.4], [1.3], [-0.2]])}
CALLS: list[int] = []


@value
class Toy:
    """A conditional denoiser of any tree in any process that tells the host when it is called.

    It has no product that is added to anything, so that no compiler contracts it and "exactly" can mean it.
    """

    gain: Array
    condition: Tree
    counted: bool = static(default=False)

    def __call__(self, x: Tree, level: Level) -> Tree:
        c = self.condition["shift"].sum()
        if self.counted:  # with a number of this call, so that `jax.vmap` makes a call for every one of its entries
            jax.debug.callback(lambda _: CALLS.append(1), c + x["a"][0])
        unit = jnp.maximum(level.alpha, level.sigma)

        def leaf(a: Array) -> Array:
            z = a / unit + c
            return (z / (self.gain + abs(z))).astype(a.dtype)

        return jax.tree.map(leaf, x)

    def check(self, t: Level) -> None:
        if np.any(np.asarray(t.time) < 0):
            raise ValueError("time must not be below 0")


PLAIN = Toy(jnp.float32(0.6), {"shift": jnp.array([0.5, 0.2])})
NULL = {"shift": jnp.array([-0.1, 0.0])}


@value
class Near:
    """A twist: clean estimates near a number are likely."""

    number: Array

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        return -0.5 * sum(((leaf - self.number) ** 2).sum() for leaf in jax.tree.leaves(x0)), x0


@value
class Far:
    """A potential: states near a number are likely."""

    number: Array

    def __call__(self, x: Tree, level: Level) -> Array:
        return -0.5 * sum(((leaf - self.number) ** 2).sum() for leaf in jax.tree.leaves(x))


@value
class Square:
    """Functions of a tree: half the squared distance to a number, the logits of two classes, and clipping to it."""

    number: Array
    kind: str = static(default="cost")

    def __call__(self, x: Tree, level: Level | None = None) -> Any:
        if self.kind == "project":
            return jax.tree.map(lambda leaf: jnp.clip(leaf, -self.number, self.number), x)
        if self.kind == "logits":
            total = 0.2 * sum(leaf.sum() for leaf in jax.tree.leaves(x))
            return jnp.stack([total, -0.5 * total])
        return 0.5 * sum(((leaf - self.number) ** 2).sum() for leaf in jax.tree.leaves(x))


# What an argument without a default is, by its name and the grid; None: no guidance is built with it.
ARGUMENTS: dict[str, Callable[[Grid], Any]] = {
    "null": lambda grid: NULL,
    "condition": lambda grid: {"shift": jnp.array([0.1, -0.7])},
    "conditions": lambda grid: {"shift": jnp.array([[0.5, 0.2], [1.0, -0.4]])},
    "scales": lambda grid: jnp.array([1.5, -0.5]),
    "weak": lambda grid: Toy(jnp.float32(0.4), {"shift": jnp.array([0.5, 0.2])}, True),
    "grid": lambda grid: grid,
    "level": lambda grid: grid.start,
    "key": lambda grid: jax.random.key(3),
    "potential": lambda grid: Far(jnp.float32(1.0)),
    "constraint": lambda grid: Square(jnp.float32(0.3)),
    "cost": lambda grid: Square(jnp.float32(0.3)),
    "logits": lambda grid: Square(jnp.float32(0.3), "logits"),
    "label": lambda grid: 1,
    "project": lambda grid: Square(jnp.float32(0.2), "project"),
    "process": lambda grid: grid.process,
    "rate": lambda grid: 0.7,
    "twist": lambda grid: Near(jnp.float32(1.0)),
    "reference": lambda grid: jax.tree.map(lambda leaf: 0.5 * leaf, X),
    "weights": lambda grid: 0.3 * np.tri(STEPS + 1, k=-1)[:, None] * np.array([[1.0], [-0.7]]),
    "skip": lambda grid: np.arange(STEPS + 1) % 2 == 1,  # one more than the calls: a shift of it is another number
}
# Settings beside these that show more of a method, by its name.
SETTINGS: dict[str, dict] = {
    "adaptive": {"threshold": 0.5},
    "cads": {"low": 0.2, "mix": 0.5},  # two numbers are back where they were, given their mean and deviation
    "characteristic": {"iterations": 2, "history": 1},
    "zero_init": {"share": 0.3},
}
# Settings that make it the plain denoiser, where that is not scale = 1 or scale = 0.
IDENTITY: dict[str, dict] = {
    "cads": {"noise": 0.0, "mix": 1.0},
    "composed": {"conditions": {"shift": PLAIN.condition["shift"][None]}, "scales": jnp.ones(1)},
    "conditioned": {"condition": PLAIN.condition},
    "constrained": {"project": Square(jnp.float32(1e9), "project")},
    "weak_to_strong": {"steps": 0},
    "zero_init": {"share": 0.0},
}
# Methods whose samples decide for themselves which calls they make, so that `jax.vmap` makes all.
OWN_CHOICE = {"adaptive"}


class Case(NamedTuple):
    name: str
    settings: dict

    @property
    def loops(self) -> bool:
        """Whether a loop with it is compiled: rules that do not remember are all alike there."""
        rule = self.settings.get("rule")
        return rule is None or hasattr(rule, "init")

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    def build(self, grid: Grid, denoise: Any = PLAIN, **changed: Any) -> Any:
        factory = getattr(guidance, self.name)
        settings = {**self.settings, **changed}
        for name, parameter in list(inspect.signature(factory).parameters.items())[1:]:
            if name in settings:
                continue
            if name == "scale":
                settings[name] = 2.5
            elif parameter.default is inspect.Parameter.empty:
                if name not in ARGUMENTS:
                    pytest.fail(f"say what {name!r} of guidance.{self.name} is in ARGUMENTS of {__file__}")
                settings[name] = ARGUMENTS[name](grid)
        return factory(denoise, **settings)


def built(name: str) -> Any:
    """The value of a factory that needs no arguments, or None."""
    try:
        return getattr(guidance, name)()
    except TypeError:
        return None


def found() -> Iterator[Case]:
    rules, schedules = [guidance.apg(0.2, 1.0, momentum=-0.5)], [guidance.interval(2.5, 0.3, 2.0)]
    for name, factory in catalogue(guidance).items():
        parameters = list(inspect.signature(factory).parameters)
        if parameters[:1] == ["denoise"] and not {"x", "x0"} & set(parameters):
            yield Case(name, SETTINGS.get(name, {}))
        elif hasattr(built(name), "combine"):
            rules.append(built(name))
    yield from (Case("classifier_free", {"rule": rule}) for rule in rules)
    yield from (Case("classifier_free", {"scale": schedule}) for schedule in schedules)


CASES = list(found())
EVERY = pytest.mark.parametrize("case", CASES, ids=repr)


def call(guided: Any, x: Tree, level: Level) -> Tree:
    """A call, the first of a run where the denoiser remembers."""
    return guided.apply(x, level, guided.init(x))[0] if remembers(guided) else guided(x, level)


@jax.jit
def value_and_gradient(guided: Any, x: Tree, level: Level) -> tuple[Tree, Tree]:
    """A call, and the gradient of the sum of its entries."""

    def total(x: Tree) -> tuple[Array, Tree]:
        x0 = call(guided, x, level)
        return sum(leaf.sum() for leaf in jax.tree.leaves(x0)), x0

    gradient, x0 = jax.grad(total, has_aux=True)(x)
    return x0, gradient


def flat(tree: Tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def at(grid: Grid, i: int) -> Level:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[i], jnp.float32), grid.t)


@EVERY
def test_value(case: Case):
    """repr names a public guidance; another number is another leaf, not another type; what is inside is forwarded."""
    grid = GRIDS["flow"]
    guided = case.build(grid)
    assert repr(guided).partition("(")[0] in {*catalogue(guidance), "Toy"}
    again = case.build(grid, Toy(jnp.float32(0.1), PLAIN.condition))
    assert jax.tree.structure(guided) == jax.tree.structure(again)
    assert jax.tree.structure(jax.tree.map(lambda leaf: leaf, guided)) == jax.tree.structure(guided)
    assert guided.condition is not None
    inner = {"shift": jnp.array([3.0, 4.0])}
    assert guidance.conditioned(guided, inner).condition is inner
    with pytest.raises(ValueError, match="time must not be below 0"):
        guided.check(jax.tree.map(lambda leaf: -np.ones_like(leaf), grid.t))


@EVERY
def test_call(case: Case):
    """One compiled function of any process: as eager, finite at both ends, with a gradient that differences confirm.

    At scale 1 (or 0), or at no strength, it is the plain denoiser to the last bit, and not without.
    """
    along = jax.tree.map(lambda leaf: jnp.cos(1 + jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), X)
    moved = [jax.tree.map(lambda a, d, h=h: a + h * d, X, along) for h in (1e-2, -1e-2)]
    settings = IDENTITY.get(case.name)
    tried = [{"scale": 1.0}, {"scale": 0.0}] if settings is None else [settings]
    changes = []
    for name, grid in GRIDS.items():
        guided, level = case.build(grid), at(grid, 2)
        x0, gradient = value_and_gradient(guided, X, level)
        if name == "vp":
            np.testing.assert_allclose(flat(x0), flat(call(guided, X, level)), rtol=2e-5, atol=2e-5)
        up, down = (flat(value_and_gradient(guided, x, level)[0]).sum() for x in moved)
        np.testing.assert_allclose(flat(gradient) @ flat(along), (up - down) / 2e-2, rtol=2e-2, atol=1e-2)
        for end in (jax.tree.map(jnp.float32, grid.process.level(0.0)), at(grid, 0)):
            assert all(np.all(np.isfinite(flat(tree))) for tree in value_and_gradient(guided, X, end)), name
        plain = flat(value_and_gradient(PLAIN, X, level)[0])
        results = [flat(value_and_gradient(case.build(grid, **settings), X, level)[0]) for settings in tried]
        assert any(np.array_equal(result, plain) for result in results), name
        changes.append(np.abs(flat(x0) - plain).max())
    assert max(changes) > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if case.loops], ids=repr)
def test_sampled(case: Case):
    """A batch is its samples, one after another; the calls are those that are counted, skipped ones are not made."""
    for grid in GRIDS.values():
        x = jax.tree.map(lambda leaf, grid=grid: jnp.float32(grid.start.sigma) * leaf, X)
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), x)
        guided = case.build(grid, dataclasses.replace(PLAIN, counted=True))
        run = lambda x, guided=guided, grid=grid: sample(jax.random.key(7), guided, solvers.ddim(), grid, x=x)
        batch, count = counted(jax.vmap(run), both)
        assert np.all(np.isfinite(flat(batch.x))) and np.all(batch.failed_at == -1)
        assert count == int(batch.nfe.sum()) >= 2 or case.name in OWN_CHOICE
        first = jax.tree.map(lambda leaf: leaf[0], batch.x)
        if remembers(guided):
            one, count = counted(run, x)
            assert count == int(one.nfe)
            alone = one.x
        else:
            alone = by_hand(case.build(grid), x, grid)
        np.testing.assert_allclose(flat(first), flat(alone), rtol=1e-4, atol=1e-4)


def by_hand(guided: Any, x: Tree, grid: Grid) -> Tree:
    """DDIM, call by call."""
    for i in range(len(grid)):
        x0, _ = value_and_gradient(guided, x, at(grid, i))
        ratio, s = np.float32(grid.s.sigma[i] / grid.t.sigma[i]), grid.s.alpha[i]
        x = jax.tree.map(lambda a, b, r=ratio, s=s, i=i: r * a + np.float32(s - grid.t.alpha[i] * r) * b, x, x0)
    return x


def counted(run: Callable, x: Tree) -> tuple[Any, int]:
    """The result, and how many calls the host was told of."""
    jax.effects_barrier()
    CALLS.clear()
    result = jax.block_until_ready(run(x))
    jax.effects_barrier()
    return result, len(CALLS)
