"""Kernels that are made of kernels: one after the other, side by side, copied, observed, in a chain.

A kernel is a value with

    backward(h) -> (message, pulled)             h after it, its pull-back before it, and what forward has to know
    forward(message, x, noise) -> Guided         a guided draw and the logarithm of its weight
    push(message, measure) -> measure            the same for measures, where they stay in their class
    guided(message)                              the kernel that push is of, where such compose (for associative scans)
    noise(key, index)                            the standard normal noise of its ``parts`` kernels, by their number

and so are compositions: backward maps compose backwards, forward maps forwards, and how the kernels are bracketed makes
no difference, not even for the noise, which belongs to the number of a kernel.  A tree is `copies` before `parallel`.
Whatever the backward maps approximate, ``pulled(x) exp(log_weight)`` is an unbiased estimate of the likelihood.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree, as_value, static, value
from diffjax.smoothing.discrete import Logarithms
from diffjax.smoothing.gaussian import Affine, guided_affine
from diffjax.smoothing.gaussian import pulled as pull
from diffjax.smoothing.potentials import Guided, Masses, Normal, Quadratic, Table, is_known, log_value, product


def sequential(first: Any, second: Any, *rest: Any) -> Any:
    """The kernel ``first`` and then ``second``, and then the rest.

    Its path is the tuple of the paths of the two, nested as the kernels are.

    Compositionality in algorithms for smoothing, arXiv:2303.13865.
    """
    both = Sequential(first, second)
    return sequential(both, *rest) if rest else both


def parallel(*kernels: Any) -> Parallel:
    """Kernels side by side: states, potentials, messages and measures are tuples.

    Compositionality in algorithms for smoothing, arXiv:2303.13865.
    """
    return Parallel(kernels)


def identity() -> Identity:
    """The kernel that does nothing, to any state."""
    return Identity()


def copies(count: int = 2) -> Copies:
    """The kernel ``x -> (x, .., x)``: a branching, after which each copy goes its own way.

    Backwards the potentials of the copies are multiplied.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an integer of at least 1, got {count!r}.")
    return Copies(count)


def observed(potential: Any, log_likelihood: Any = None) -> Observed:
    """The kernel that leaves x where it is, with the mass g(x): something is observed there.

    Args:
        potential: g as a potential, for instance what an observation kernel makes of what was seen,
            ``linear_gaussian(..).backward(point(y))[1]``.
        log_likelihood: ``x -> log g(x)`` where that is not in the potentials' class: ``potential`` then stands in for
            it on the way back, and the weight is the ratio.
    """
    return Observed(potential, None if log_likelihood is None else as_value(log_likelihood))


def chain(kernel: Any, associative: bool = False) -> Chain:
    """N kernels one after the other, of one kind: a kernel whose leaves have a leading axis of length N.

    The same as `sequential` of the N, with a scan instead of N programs, and a path with a leading axis.

    Args:
        kernel: any kernel from a space to itself, stacked; best made by `jax.vmap` of its factory.
        associative: pull back, and push measures forward, by associative scans, of depth log2 N: linear-Gaussian and
            finite kernels, observations of their potentials, and sequences of these.  Backwards each is composed with
            all those after it, first among themselves; forwards each guided kernel with all those before it.  The same
            up to rounding, where (H and Q being well scaled) nothing cancels.

    Compositionality in algorithms for smoothing, arXiv:2303.13865.

    Raises ValueError for ``associative`` with kernels that do not compose in their class.
    """
    if associative and not composes(kernel):
        raise ValueError(f"associative needs kernels that compose in their class (have element), got {kernel!r}.")
    return Chain(kernel, associative)


def composes(kernel: Any) -> bool:
    """Whether a kernel can be composed with others of its kind to one of the kind."""
    if isinstance(kernel, Sequential):
        return composes(kernel.first) and composes(kernel.second)
    if isinstance(kernel, Observed):
        return isinstance(kernel.potential, Quadratic | Table)
    if isinstance(kernel, Chain):
        return composes(kernel.kernel)
    return hasattr(kernel, "element")


@value
class Sequential:
    first: Any
    second: Any
    factory = "sequential"

    @property
    def parts(self) -> int:
        return self.first.parts + self.second.parts

    def noise(self, key: Array, index: Array = 0) -> Tree:
        return self.first.noise(key, index), self.second.noise(key, index + self.first.parts)

    def backward(self, h: Any) -> tuple[Any, Any]:
        later, middle = self.second.backward(h)
        sooner, source = self.first.backward(middle)
        return (sooner, later), source

    def forward(self, message: Any, x: Tree, noise: Tree) -> Guided:
        half = self.first.forward(message[0], x, noise[0])
        end = self.second.forward(message[1], half.x, noise[1])
        return Guided(end.x, half.log_weight + end.log_weight, (half.path, end.path))

    def push(self, message: Any, measure: Any) -> Any:
        return self.second.push(message[1], self.first.push(message[0], measure))

    def element(self) -> Any:
        return self.first.element().then(self.second.element())

    def guided(self, message: Any) -> Any:
        first, second = self.first.guided(message[0]), self.second.guided(message[1])
        return first if second is None else second if first is None else first.then(second)


@value
class Parallel:
    kernels: tuple
    factory = "parallel"

    @property
    def parts(self) -> int:
        return sum(kernel.parts for kernel in self.kernels)

    def noise(self, key: Array, index: Array = 0) -> tuple:
        draws = []
        for kernel in self.kernels:
            draws.append(kernel.noise(key, index))
            index = index + kernel.parts
        return tuple(draws)

    def backward(self, h: tuple) -> tuple[tuple, tuple]:
        pairs = [kernel.backward(part) for kernel, part in zip(self.kernels, h, strict=True)]
        return tuple(message for message, _ in pairs), tuple(source for _, source in pairs)

    def forward(self, message: tuple, x: tuple, noise: tuple) -> Guided:
        zipped = zip(self.kernels, message, x, noise, strict=True)
        ends = [kernel.forward(*arguments) for kernel, *arguments in zipped]
        log_weight = sum(end.log_weight for end in ends)
        return Guided(tuple(end.x for end in ends), log_weight, tuple(end.path for end in ends))

    def push(self, message: tuple, measure: tuple) -> tuple:
        return tuple(k.push(m, part) for k, m, part in zip(self.kernels, message, measure, strict=True))


@value
class Identity:
    factory = "identity"
    parts = 0

    def noise(self, key: Array, index: Array = 0) -> tuple:
        return ()

    def backward(self, h: Any) -> tuple[tuple, Any]:
        return (), h

    def forward(self, message: tuple, x: Tree, noise: tuple) -> Guided:
        return Guided(x, jnp.zeros(()), ())

    def push(self, message: tuple, measure: Any) -> Any:
        return measure


@value
class Copies:
    count: int = static()
    factory = "copies"
    parts = 0

    def noise(self, key: Array, index: Array = 0) -> tuple:
        return ()

    def backward(self, h: tuple) -> tuple[tuple, Any]:
        if len(h) != self.count:
            raise ValueError(f"{self.count} copies need as many potentials, got {len(h)}.")
        source = h[0]
        for other in h[1:]:
            source = product(source, other)
        return (), source

    def forward(self, message: tuple, x: Tree, noise: tuple) -> Guided:
        return Guided((x,) * self.count, jnp.zeros(()), ())

    def push(self, message: tuple, measure: Any) -> tuple:
        """The marginal measures of the copies, which are not independent."""
        return (measure,) * self.count


@value
class Observed:
    potential: Any
    log_likelihood: Any = None
    factory = "observed"
    parts = 0

    def noise(self, key: Array, index: Array = 0) -> tuple:
        return ()

    def backward(self, h: Any) -> tuple[tuple, Any]:
        return (), product(h, self.potential)

    def forward(self, message: tuple, x: Tree, noise: tuple) -> Guided:
        if self.log_likelihood is None:
            return Guided(x, jnp.zeros(()), ())
        log_h = log_value(self.potential, x)
        none = log_h == -jnp.inf  # nothing is guided to there
        return Guided(x, jnp.where(none, -jnp.inf, self.log_likelihood(x) - jnp.where(none, 0.0, log_h)), ())

    def push(self, message: tuple, measure: Any) -> Any:
        if self.log_likelihood is not None:
            raise ValueError("a likelihood outside the potentials' class takes measures out of theirs: draw.")
        return measure

    def guided(self, message: Any) -> None:
        """Guided, it does nothing: its mass is in the potentials."""

    def element(self) -> Affine | Logarithms:
        if isinstance(self.potential, Table):
            logs = self.potential.log_values
            same = jnp.arange(len(logs))
            return Logarithms(jnp.where(same[:, None] == same, logs, -jnp.inf))
        eye = jnp.eye(len(self.potential.shift), dtype=self.potential.shift.dtype)
        return Affine(eye, 0.0 * self.potential.shift, 0.0 * eye, self.potential)


@value
class Chain:
    kernel: Any  # stacked
    associative: bool = static()
    factory = "chain"

    def __len__(self) -> int:
        return jax.tree.leaves(self.kernel)[0].shape[0]

    @property
    def parts(self) -> int:
        return len(self) * self._parts_of_one

    @property
    def _parts_of_one(self) -> int:
        """Not those of the stack: were it one of chains, its length would be taken for theirs."""
        one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return jax.tree.map(one, self.kernel).parts

    def noise(self, key: Array, index: Array = 0) -> Tree:
        parts = self._parts_of_one
        each = lambda i, kernel: kernel.noise(key, index + i * parts)
        return jax.vmap(each)(jnp.arange(len(self)), self.kernel)

    def backward(self, h: Any) -> tuple[Any, Any]:
        """Messages are those of the kernels, stacked; of the last one apart where its end is known."""
        kernel, last = self.kernel, None
        if is_known(h):  # a point mass has another type than its pull-back
            last, h = at(kernel, -1).backward(h)
            kernel = jax.tree.map(lambda leaf: leaf[:-1], kernel)
        if not jax.tree.leaves(kernel)[0].shape[0]:
            return (None, last), h
        if self.associative:
            messages, h = _associative(kernel, h)
            return (messages, last), h

        def body(h: Any, kernel: Any) -> tuple[Any, Any]:
            message, source = kernel.backward(h)
            return source, message

        h, messages = jax.lax.scan(body, h, kernel, reverse=True)
        return (messages, last), h

    def forward(self, message: Any, x: Tree, noise: Tree) -> Guided:
        def body(x: Tree, inputs: Any) -> tuple[Tree, Guided]:
            kernel, message, noise = inputs
            end = kernel.forward(message, x, noise)
            return end.x, end

        x, ends = self.walk(body, x, message, noise)
        return Guided(x, jnp.sum(ends.log_weight), ends.path)

    def walk(self, body: Any, carry: Tree, message: Any, noise: Tree = ()) -> tuple[Tree, Tree]:
        """``body(carry, (kernel, message, noise)) -> (carry, output)`` over the kernels, in order."""
        messages, last = message
        carry = jax.tree.map(jnp.asarray, carry)
        inputs, outputs = (self.kernel, noise), []
        if messages is not None:
            count = len(self) if last is None else len(self) - 1
            kernel, draws = jax.tree.map(lambda leaf: leaf[:count], inputs)
            carry, output = jax.lax.scan(body, carry, (kernel, messages, draws))
            outputs.append(output)
        if last is not None:
            kernel, draws = at(inputs, -1)
            carry, output = body(carry, (kernel, last, draws))
            outputs.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], output))
        return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)

    def push(self, message: Any, measure: Any) -> Any:
        return self.marginals(message, measure)[0]

    def marginals(self, message: Any, measure: Any) -> tuple[Any, Any]:
        """``(the measure after the last, those after every kernel, stacked)``: smoothing marginals."""
        if self.associative:
            return self._composed_marginals(message, measure)

        def body(measure: Any, inputs: Any) -> tuple[Any, Any]:
            kernel, message, _ = inputs
            after = kernel.push(message, measure)
            return after, after

        return self.walk(body, measure, message)

    def _composed_marginals(self, message: Any, measure: Any) -> tuple[Any, Any]:
        messages, last = message
        found, now = [], measure
        if messages is not None:
            before = self._prefixes(message)
            if before is None:  # observations alone
                steps = len(self) if last is None else len(self) - 1
                after = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (steps, *jnp.shape(leaf))), measure)
            else:
                after = jax.vmap(lambda step: step.push(measure))(before)
            found, now = [after], at(after, -1)
        if last is not None:
            now = at(self.kernel, -1).push(last, now)
            found.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], now))
        return now, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)

    def _prefixes(self, message: Any) -> Any:
        """The composition of each of the guided kernels with all before it, but for a last one with a known end."""
        messages, last = message
        kernel = self.kernel if last is None else jax.tree.map(lambda leaf: leaf[:-1], self.kernel)
        steps = jax.vmap(lambda k, m: k.guided(m))(kernel, messages)
        if steps is None:
            return None
        return jax.lax.associative_scan(jax.vmap(lambda sooner, later: sooner.then(later)), steps)

    def guided(self, message: Any) -> Any:
        """All of them, guided, as one."""
        messages, last = message
        before = None if messages is None else self._prefixes(message)
        first = None if before is None else at(before, -1)
        second = None if last is None else at(self.kernel, -1).guided(last)
        return first if second is None else second if first is None else first.then(second)

    def element(self) -> Any:
        """All of them as one."""
        return at(_suffixes(self.kernel), 0)


def _suffixes(kernel: Any) -> Any:
    """The composition of each of the stacked kernels with all that follow it."""
    elements = jax.vmap(lambda k: k.element())(kernel)
    both = jax.vmap(lambda later, sooner: sooner.then(later))
    return jax.lax.associative_scan(both, elements, reverse=True)


def _associative(kernel: Any, h: Any) -> tuple[Any, Any]:
    sources = jax.vmap(lambda element: element.pull(h))(_suffixes(kernel))
    targets = jax.tree.map(lambda after, end: jnp.concatenate([after[1:], end[None]]), sources, h)
    messages, _ = jax.vmap(lambda k, target: k.backward(target))(kernel, targets)
    return messages, at(sources, 0)


def at(tree: Tree, index: int) -> Tree:
    """One of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def start(pulled: Any, prior: Normal | Masses | None = None) -> Any:
    """The measure from which ``push`` begins: the prior times its potential; without a prior, no state of mass Z.

    Args:
        pulled: the potential before the first kernel.
        prior: `Normal` or `Masses` of the first state; None where the first kernel is itself a prior.
    """
    if prior is None:  # a vector without entries, or the only state of one
        if isinstance(pulled, Table):
            return Masses(pulled.log_values)
        return Normal(pulled.shift, pulled.precision, pulled.log_scale)
    if isinstance(prior, Masses):
        return Masses(prior.log_masses + pulled.log_values)
    none = jnp.zeros((len(prior.mean), 0), prior.mean.dtype)
    _, mean, covariance = guided_affine(pulled, none, prior.mean, prior.covariance)
    return Normal(mean, covariance, prior.log_mass + pull(pulled, none, prior.mean, prior.covariance).log_scale)
