"""The one interface of all models."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, overload

import equinox as eqx
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._types import Options

Model = TypeVar("Model", bound="AbstractModel")


class AbstractModel(eqx.Module):
    """What every model of `deqjax.models` can do, under the same names.

    Calling a model is `logits` of the `value` of its `solve`. These three take

    | argument | meaning |
    |---|---|
    | `inputs` | a batch: tokens (batch, length), images (batch, channels, height, width) |
    | `state` | what the call before returned, or nothing |
    | `key` | for dropout: the same key for `solve` and `logits` of one forward pass |
    | `z0` | the initial iterate, a warm start for example |
    | `max_steps` | in place of the model's own |
    | `throw` | whether a solve that fails raises |
    | `options` | of the solve; see `deqjax.fixed_point` |

    **State.** Models with batch norms need the `equinox.nn.State` that
    `equinox.nn.make_with_state` makes; `DEQTransformerLM` takes and returns the memory
    of the tokens before; the others have none. As for `equinox.nn.Sequential`, a call
    that is given a state returns a pair of its result and the new state, and a call
    without one returns the result alone. Code that is to run with every model makes
    the model with `equinox.nn.make_with_state`, always passes the state and always
    takes the new one: models without a state return it as it is.

    **Configurations.** `configurations` holds the arguments of the published
    configurations by name; `published` makes them.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> for Model, changes, inputs in [
        ...     (deqjax.models.RevDEQLM, {"dim": 12}, jnp.ones((2, 4), int)),
        ...     (deqjax.models.RevDEQClassifier, {}, jnp.ones((2, 3, 32, 32))),
        ... ]:
        ...     name = next(iter(Model.configurations))
        ...     make = eqx.nn.make_with_state(Model.published)
        ...     def run(key):
        ...         model, state = make(name, key=key, **changes)
        ...         sol, state = model.solve(inputs, state)
        ...         return model.logits(sol.value, state)
        ...     logits, state = jax.eval_shape(run, jax.random.key(0))
        ...     print(Model.__name__, name, logits.shape)
        RevDEQLM wikitext103 (2, 4, 50304)
        RevDEQClassifier cifar10 (2, 10)
    """  # noqa: E501 (a row of the table cannot be broken)

    configurations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds the constructors of former versions, `cls.name(key=key)`."""
        super().__init_subclass__(**kwargs)
        for name in cls.configurations:
            setattr(cls, name, classmethod(_named(name)))

    @classmethod
    def published(
        cls: type[Model], name: str, *, key: PRNGKeyArray, **changes: Any
    ) -> Model:
        """A published configuration.

        Args:
            name: one of `configurations`.
            key: decides the initial parameters.
            **changes: arguments of the constructor in place of the published ones.

        Raises:
            ValueError: if there is no configuration of that name.
        """
        return cls._make(**{**cls.configuration(name), **changes}, key=key)

    @classmethod
    def configuration(cls, name: str) -> dict[str, Any]:
        """The arguments of a published configuration.

        Args:
            name: one of `configurations`.

        Raises:
            ValueError: if there is no configuration of that name.
        """
        if name not in cls.configurations:
            raise ValueError(
                f"`name` must be a published configuration of {cls.__name__}, one of "
                f"{sorted(cls.configurations)}; got {name!r}. For other sizes call "
                f"{cls.__name__} itself."
            )
        return dict(cls.configurations[name])

    @classmethod
    def _make(cls: type[Model], **arguments: Any) -> Model:
        """A model of a configuration's arguments; by default its constructor's."""
        return cls(**arguments)

    @overload
    def __call__(
        self,
        inputs: Any,
        state: None = None,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> Array: ...
    @overload
    def __call__(
        self,
        inputs: Any,
        state: Any,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> tuple[Array, Any]: ...
    def __call__(
        self,
        inputs: Any,
        state: Any = None,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> Array | tuple[Array, Any]:
        """The logits, with the new state if one is given.

        Args:
            inputs: a batch of them.
            state: see above.
            z0: the initial iterate; None: the model's own.
            key: for dropout; not needed at a rate of 0 or in inference mode.
            max_steps: in place of the model's own.
            throw: whether a solve that fails raises; see `deqjax.fixed_point`.
            options: of the solve; see `deqjax.fixed_point`.
        """
        sol, new = self._solve(
            inputs,
            state,
            z0=z0,
            key=key,
            max_steps=max_steps,
            throw=throw,
            options=options,
        )
        logits, new = self._logits(sol.value, new, key)
        return logits if state is None else (logits, new)

    @overload
    def solve(
        self,
        inputs: Any,
        state: None = None,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> optx.Solution: ...
    @overload
    def solve(
        self,
        inputs: Any,
        state: Any,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> tuple[optx.Solution, Any]: ...
    def solve(
        self,
        inputs: Any,
        state: Any = None,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> optx.Solution | tuple[optx.Solution, Any]:
        """The equilibrium, with all that `deqjax.fixed_point` returns.

        `stats["residual"]` has one entry for each example.

        Args:
            inputs: a batch of them.
            state: see above; if it is given, the new one is returned too.
            z0: see `__call__`.
            key: see there.
            max_steps: see there.
            throw: see there.
            options: see there.
        """
        sol, new = self._solve(
            inputs,
            state,
            z0=z0,
            key=key,
            max_steps=max_steps,
            throw=throw,
            options=options,
        )
        return sol if state is None else (sol, new)

    @overload
    def logits(
        self, z: PyTree, state: None = None, *, key: PRNGKeyArray | None = None
    ) -> Array: ...
    @overload
    def logits(
        self, z: PyTree, state: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Any]: ...
    def logits(
        self, z: PyTree, state: Any = None, *, key: PRNGKeyArray | None = None
    ) -> Array | tuple[Array, Any]:
        """The logits that belong to an equilibrium, with the new state if one is given.

        Args:
            z: the `value` of what `solve` returned.
            state: see above.
            key: that of `solve`.
        """
        logits, new = self._logits(z, state, key)
        return logits if state is None else (logits, new)

    @abc.abstractmethod
    def _solve(
        self,
        inputs: Any,
        state: Any,
        *,
        z0: PyTree,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        """As `solve`, always with the new state."""

    @abc.abstractmethod
    def _logits(
        self, z: PyTree, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Array, Any]:
        """As `logits`, always with the new state."""


def check_state(state: Any) -> None:
    """Raise unless there is a state for a model with batch norms."""
    if not isinstance(state, eqx.nn.State):
        raise ValueError(
            "`state` must be the state of the model's batch norms; got "
            f"{type(state).__name__}. Make the model with "
            "`model, state = equinox.nn.make_with_state(make)(key=key)`, and pass the "
            "state that the last call returned."
        )


def _named(name: str) -> Any:
    return lambda cls, *, key, **changes: cls.published(name, key=key, **changes)
