# %% [markdown]
# # Implicit differentiation: derived, checked, and compared with unrolling
#
# A solver may take five steps or five hundred. The derivative of a fixed point needs
# none of them. This notebook derives the formula, checks it in three ways, shows where
# it is not defined, and measures what it saves over backpropagation through the steps.
#
# There are exercises at the end, with solutions.

# %%
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import deqjax

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The formula
#
# Let $z^*(\theta) = f(z^*(\theta), \theta)$. Differentiate both sides, with $J =
# \partial_z f$ and $\partial_\theta f$ taken at the fixed point:
#
# $$ \dot z = J \dot z + \partial_\theta f\, \dot\theta
#    \quad\Longrightarrow\quad
#    \dot z = (I - J)^{-1}\, \partial_\theta f\, \dot\theta . $$
#
# This is forward mode. For the gradient of a loss $\ell(z^*)$ transpose it. With $\bar
# z = \nabla \ell(z^*)$,
#
# $$ \lambda = (I - J)^{-\top}\, \bar z, \qquad
#    \nabla_\theta \ell = (\partial_\theta f)^\top \lambda . $$
#
# So a gradient is one linear system, and one pull-back of $f$. Nothing in it knows how
# $z^*$ was found.
#
# The implicit function theorem supplies what the calculation took for granted: if $f$
# is continuously differentiable and $I - J$ is invertible, that is, **if 1 is no
# eigenvalue of** $J$, then near $\theta$ there is exactly one branch $z^*(\theta)$, and
# it is differentiable. $f$ need not contract.

# %% [markdown]
# ## Written down once by hand
#
# With the matrix $I - J$ in full, on a map of 24 unknowns:

# %%
n = 24
weight = 0.8 * jr.normal(jr.key(0), (n, n)) / n**0.5
bias = jr.normal(jr.key(1), (n,))
target = jr.normal(jr.key(2), (n,))
theta = (weight, bias)


def fn(z, args):
    weight, bias = args
    return jnp.tanh(weight @ z + bias)


def loss(z):
    return 0.5 * jnp.sum((z - target) ** 2)


def by_hand(theta):
    solver = deqjax.Anderson(1e-14, 1e-14)
    z = deqjax.fixed_point(fn, jnp.zeros(n), theta, solver=solver).value
    jacobian = jax.jacobian(fn)(z, theta)
    adjoint_state = jnp.linalg.solve((jnp.eye(n) - jacobian).T, jax.grad(loss)(z))
    _, pull_back = jax.vjp(lambda theta: fn(z, theta), theta)
    return pull_back(adjoint_state)[0]


# %% [markdown]
# The same by `ImplicitAdjoint`, which never forms $J$. It solves the system by GMRES,
# whose only access to $J$ is the product $J^\top v$. That is why it works when $z$ has
# millions of entries.


# %%
def solution(theta, solver, adjoint, steps=100):
    return deqjax.fixed_point(
        fn, jnp.zeros(n), theta, solver=solver, adjoint=adjoint, max_steps=steps
    ).value


def gradient(theta, solver, adjoint, steps=100):
    return jax.grad(lambda theta: loss(solution(theta, solver, adjoint, steps)))(theta)


def relative_error(a, b):
    a, b = (jnp.concatenate([x.ravel() for x in tree]) for tree in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


exact = by_hand(theta)
tight = deqjax.Anderson(1e-13, 1e-13)
implicit = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-12))
matrix_free = gradient(theta, tight, implicit)

# Finite differences along a random direction know nothing of the theorem.
direction = (jr.normal(jr.key(3), (n, n)), jr.normal(jr.key(4), (n,)))
shifted = lambda h: loss(
    solution(jax.tree.map(lambda t, d: t + h * d, theta, direction), tight, implicit)
)
step = 1e-5
difference = (shifted(step) - shifted(-step)) / (2 * step)
slope = sum(jnp.vdot(g, d) for g, d in zip(matrix_free, direction, strict=True))

hand_error = relative_error(matrix_free, exact)
difference_error = float(abs(slope - difference) / abs(difference))
print(f"against the dense matrix    {hand_error:.1e}")
print(f"against finite differences  {difference_error:.1e}")

# %% [markdown]
# ## When is it well defined?
#
# The scalar map $f(z) = \tanh(wz + b)$ with $w = 2$ shows all cases. Its fixed points
# form an S-shaped curve over $b$, and
#
# $$ \frac{d z^*}{d b} = \frac{s}{1 - w s}, \qquad
#    s = \tanh'(w z^* + b) = 1 - z^{*2}. $$
#
# - On the outer branches $J = ws < 1$: they attract, and the derivative is positive.
# - On the middle branch $J > 1$: it repels, iteration never finds it, and still the
#   derivative is defined. It is negative.
# - At the two folds $J = 1$. The branch ends there, the derivative is infinite, and
#   beyond the fold the solution *jumps* to the other branch. No method can give a
#   useful gradient there, since the function that one wants to differentiate is not
#   continuous.
#
# Near a fold, gradients explode before the solve fails. In a trained model this shows
# as a large condition number of $I - J$, which `diagnostics.singular_values` reports.

# %%
w = 2.0


def scalar(z, b):
    return jnp.tanh(w * z + b)


def branch(b, z0, solver):
    """The fixed point found from z0, and its derivative by the library."""

    def solve(b):
        sol = deqjax.fixed_point(
            scalar, z0, b, solver=solver, max_steps=300, adjoint=implicit
        )
        return sol.value

    return jax.value_and_grad(solve)(b)


fold_z = -jnp.sqrt(1 - 1 / w)  # where w (1 - z²) = 1
fold_b = jnp.arctanh(fold_z) - w * fold_z
newton = deqjax.NewtonKrylov(1e-12, 1e-12)
gaps = jnp.logspace(-5, -0.5, 19)
lower, lower_slope = jax.vmap(lambda gap: branch(fold_b - gap, -1.0, newton))(gaps)
middle, middle_slope = branch(jnp.array(0.0), jnp.array(0.05), newton)
condition = deqjax.diagnostics.singular_values(
    scalar, lower[:, None], (fold_b - gaps)[:, None], batch_ndim=1
).condition
print(f"fold at b = {fold_b:.4f}; the slope grows as 1/√gap:")
for i in (0, 8, 16):
    print(f"  gap {gaps[i]:.0e}: dz*/db = {lower_slope[i]:8.2f}")
print(
    f"on the repelling branch at b = 0: z* = {middle:.3f}, dz*/db = {middle_slope:.3f}"
)

# %% [markdown]
# ## Unrolling against implicit
#
# The other way is to differentiate the $N$ steps of the solver, as one would a network
# of $N$ layers: `UnrolledAdjoint`. Its gradient is exact too, but for another function,
# $\theta \mapsto z_N(\theta)$. If the iteration converges, so does its derivative,
# somewhat more slowly.
#
# Both are wrong as gradients of $z^*$ where the solve is not converged. What differs is
# the price: unrolling keeps the trajectory.

# %%
depths = [1, 2, 4, 8, 16, 32, 64]
errors = {"z_N itself": [], "unrolled": [], "implicit": [], "implicit, Anderson": []}
fixed = deqjax.Picard(None, None)
anderson = deqjax.Anderson(None, None)
z_star = solution(theta, tight, implicit)


def after(solver, adjoint):
    """A compiled function: z_N and its gradient, for a number of steps N <= 64."""

    def value(theta, depth):
        sol = deqjax.fixed_point(
            fn,
            jnp.zeros(n),
            theta,
            solver=solver,
            adjoint=adjoint,
            options={"step_budget": depth},
        )
        return loss(sol.value), sol.value

    return jax.jit(jax.grad(value, has_aux=True))


for name, solver, adjoint in (
    ("unrolled", fixed, deqjax.UnrolledAdjoint()),
    ("implicit", fixed, implicit),
    ("implicit, Anderson", anderson, implicit),
):
    steps = after(solver, adjoint)
    for depth in depths:
        found, z = steps(theta, depth)
        errors[name].append(relative_error(found, exact))
        if name == "unrolled":
            errors["z_N itself"].append(float(jnp.linalg.norm(z - z_star)))


def memory(adjoint, depth):
    """Bytes of temporary memory of a gradient, by the compiler's account."""
    batch = jnp.zeros((256, n))
    solve = lambda theta: jnp.sum(
        deqjax.fixed_point(
            lambda z, t: jnp.tanh(z @ t[0] + t[1]),
            batch,
            theta,
            solver=fixed,
            adjoint=adjoint,
            max_steps=depth,
        ).value
    )
    compiled = jax.jit(jax.grad(solve)).lower(theta).compile()
    return compiled.memory_analysis().temp_size_in_bytes


state = 256 * n * 8
sizes_at = [4, 32, 256]
sizes = {
    name: [memory(make(depth), depth) / state for depth in sizes_at]
    for name, make in {
        "unrolled, all kept": lambda depth: deqjax.UnrolledAdjoint(checkpoints=depth),
        "unrolled, √N kept": lambda depth: deqjax.UnrolledAdjoint(),
        "implicit": lambda depth: deqjax.ImplicitAdjoint(),
    }.items()
}

# %%
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
grid = jnp.linspace(-0.999, 0.999, 400)
curve = jnp.arctanh(grid) - w * grid
slopes = w * (1 - grid**2)
axes[0].plot(jnp.where(slopes < 1, curve, jnp.nan), grid, label="attracts, J < 1")
axes[0].plot(jnp.where(slopes > 1, curve, jnp.nan), grid, "--", label="repels, J > 1")
axes[0].plot([fold_b, -fold_b], [fold_z, -fold_z], "ko", ms=5, label="fold, J = 1")
axes[0].set(xlabel="b", ylabel="z*", xlim=(-1, 1), title="z = tanh(2z + b)")
for name, values in errors.items():
    axes[1].loglog(depths, np.maximum(values, 1e-15), ".-", label=name)
axes[1].set(xlabel="steps N", ylabel="relative error", title="Gradient after N steps")
for name, values in sizes.items():
    axes[2].loglog(sizes_at, values, ".-", label=name)
axes[2].set(xlabel="steps N", ylabel="copies of z", title="Memory of the gradient")
axes[2].set_xticks(sizes_at, sizes_at)
axes[2].minorticks_off()
for ax in axes:
    ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# The gradient of the unrolled steps lags a little behind $z_N$. The implicit one has an
# error proportional to that of $z_N$, so that a better *solver*, such as Anderson's, is
# all that it takes to improve the *gradient*. Its memory does not depend on $N$. It is
# not small: GMRES keeps a few dozen states. `deqjax.linear.GMRES(restart=10)` keeps
# fewer, and `deqjax.linear.Neumann()` five.

# %% [markdown]
# ## Exercises
#
# 1. For $f(z) = Wz + b$ and $\ell = c^\top z^*$, derive $\nabla_b \ell$ and $\nabla_W
#    \ell$. Check them.
# 2. Show that for a contraction with factor $\kappa$ the gradient cannot be longer than
#    $\lVert \bar z \rVert \cdot \lVert \partial_\theta f \rVert / (1 - \kappa)$. What
#    follows for a cell normalised to $\kappa = 0.99$?
# 3. Neumann's series $\lambda = \sum_k (J^\top)^k \bar z$ also solves the adjoint
#    system, if $\rho(J) < 1$. How many terms does it take for $10^{-6}$, compared with
#    GMRES?
#
# ## Solutions
#
# **1.** $J = W$ and $\bar z = c$, so $\lambda = (I - W)^{-\top} c$. Since $\partial_b f
# = I$, $\nabla_b \ell = \lambda$. Since $\partial f_i / \partial W_{ij} = z^*_j$,
# $\nabla_W \ell = \lambda\, {z^*}^\top$: an outer product, as for one linear layer,
# with $\lambda$ in the place of the cotangent.


# %%
def affine_loss(theta):
    return jnp.vdot(
        target,
        deqjax.fixed_point(
            lambda z, t: t[0] @ z + t[1],
            jnp.zeros(n),
            theta,
            solver=tight,
            adjoint=implicit,
        ).value,
    )


grad_weight, grad_bias = jax.grad(affine_loss)((0.5 * weight, bias))
matrix = jnp.eye(n) - 0.5 * weight
adjoint_state = jnp.linalg.solve(matrix.T, target)
outer = jnp.outer(adjoint_state, jnp.linalg.solve(matrix, bias))
affine_error = relative_error((grad_weight, grad_bias), (outer, adjoint_state))
print(f"{affine_error:.1e}")

# %% [markdown]
# **2.** $\lVert (I - J)^{-1} \rVert \le \sum_k \lVert J \rVert^k \le 1/(1 - \kappa)$.
# At $\kappa = 0.99$ a gradient may be a hundred times longer than that of one layer. It
# need not be: the bound is attained only along an eigenvector with an eigenvalue near
# 0.99.
#
# **3.** The series gains a factor $\rho$ per product; GMRES takes the best combination
# of the same vectors.

# %%
jacobian = jax.jacobian(fn)(z_star, theta)
radius = float(jnp.max(jnp.abs(jnp.linalg.eigvals(jacobian))))
products = {}
for name, solver in {
    "Neumann": deqjax.linear.Neumann(1e-6),
    "GMRES": deqjax.linear.GMRES(1e-6),
}.items():

    def probed(theta, probe, solver=solver):
        return loss(solution(theta, tight, deqjax.ImplicitAdjoint(solver, probe=probe)))

    stats = jax.grad(probed, argnums=1)(theta, deqjax.BackwardStats())
    products[name] = int(stats.num_products)
print(f"ρ = {radius:.2f}: {products}")

# %% [markdown]
# ## What this notebook claims

# %%
# The formula is right: against the dense matrix, and against finite differences.
assert hand_error < 1e-10
assert difference_error < 1e-7

# It holds on a repelling branch, and grows as 1/√gap towards a fold.
assert abs(middle) < 1e-9
assert abs(middle_slope - 1 / (1 - w)) < 1e-8
analytic = (1 - lower**2) / (1 - w * (1 - lower**2))
assert float(jnp.max(jnp.abs(lower_slope / analytic - 1))) < 1e-6
growth = float(jnp.log(lower_slope[0] / lower_slope[8]) / jnp.log(gaps[8] / gaps[0]))
assert abs(growth - 0.5) < 0.02

# Unrolling converges to the same gradient, later than the implicit one.
assert errors["unrolled"][-1] < 1e-6
assert errors["implicit"][-1] < 1e-6
assert errors["implicit"][3] < errors["unrolled"][3]
assert errors["implicit, Anderson"][4] < errors["implicit"][4]

# Memory: that of the implicit gradient does not grow with the depth.
assert max(sizes["implicit"]) < 1.1 * min(sizes["implicit"])
assert sizes["unrolled, all kept"][-1] > 250

# The exercises.
assert affine_error < 1e-10
assert products["GMRES"] < products["Neumann"]
assert products["Neumann"] > 0.7 * np.log(1e-6) / np.log(radius)
