"""What every adjoint is to optimistix."""

import abc
from collections.abc import Callable

import optimistix as optx
from jaxtyping import PyTree

from .._problem import Problem, Solved


class AbstractAdjoint(optx.AbstractAdjoint):
    """The gradient of a solve; a subclass says how to solve with one."""

    @abc.abstractmethod
    def solve(self, problem: Problem) -> Solved:
        """Solve the problem, with a derivative."""

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        return self.solve(Problem.of(inputs, rewrite_fn)).outputs()

    def check_fixed_point(self, problem: Problem) -> None:
        """Raise unless the problem is one in which I − J is to be inverted."""
        if not isinstance(problem.solver, optx.AbstractFixedPointSolver):
            raise TypeError(
                f"`{type(self).__name__}` approximates the inverse of I − J and so "
                "needs a fixed-point problem; got one for "
                f"{type(problem.solver).__name__}. Use `deqjax.fixed_point`."
            )
