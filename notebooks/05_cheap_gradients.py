# %% [markdown]
# # Cheap gradients and their bias
#
# The exact gradient of a fixed point solves $(I - J)^\top \lambda = \bar z$. Cheap
# gradients replace the solve by a guess for $\lambda$:
#
# | | $\lambda$ | products |
# |---|---|---|
# | `JFBAdjoint` | $\bar z$ | none |
# | `NeumannAdjoint(k)` | $\sum_{i<k} (J^\top)^i \bar z$ | $k - 1$ |
# | `PhantomAdjoint(k, β)` | $\beta \sum_{i<k} D^i \bar z$ | $k$ |
# | `ShineAdjoint` | $B^{-\top} \bar z$, with Broyden's estimate $B$ of $I - J$ | none |
# | `ImplicitAdjoint` | the solution, to a tolerance of your choice | as it takes |
#
# with $D = (1-\beta) I + \beta J^\top$. All but the last are **biased**: the error does
# not average out over a training. This notebook measures the bias as the spectral
# radius $\rho(J)$ grows, and shows how to see it in a training of one's own.

# %%
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import deqjax

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A map with a chosen radius
#
# For $f(z) = Wz + b$ the Jacobian is $W$ everywhere, so that its spectrum can be
# chosen: here symmetric, with eigenvalues spread over $[-\rho, \rho]$.

# %%
n = 32
rotation = jnp.linalg.qr(jr.normal(jr.key(0), (n, n)))[0]
b = jr.normal(jr.key(1), (n,))


def fn(z, args):
    weight, b = args
    return weight @ z + b


def weight_of(radius):
    return rotation @ jnp.diag(radius * jnp.linspace(-1, 1, n)) @ rotation.T


def loss(z):
    return jnp.sum(jnp.tanh(z))


adjoints = {
    "JFB": deqjax.JFBAdjoint(),
    "5 terms": deqjax.NeumannAdjoint(5),
    "phantom, 5, 0.5": deqjax.PhantomAdjoint(5, 0.5),
    "SHINE": deqjax.ShineAdjoint(),
    "GMRES to 1e-2": deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-2)),
}
radii = (0.2, 0.5, 0.9, 0.99)
# SHINE needs Broyden's method, and the others take it too.
solver = deqjax.Broyden(1e-10, 1e-12, history=30)
reports = [
    deqjax.diagnostics.gradient_report(
        fn,
        jnp.zeros(n),
        (weight_of(radius), b),
        solver=solver,
        adjoints=adjoints,
        loss=loss,
        max_steps=300,
        repeats=1,
    )
    for radius in radii
]
reports[2]

# %% [markdown]
# *Angle* is the direction, *length* the ratio of norms. A wrong length alone would be a
# wrong learning rate; but since it changes with $\rho$, and $\rho$ grows during
# training, no constant corrects it.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for i, name in enumerate(adjoints):
    errors = [float(report.error[i]) for report in reports]
    angles = [float(report.angle[i]) for report in reports]
    distance = [1 - radius for radius in radii]
    style = "x--" if name == "SHINE" else ".-"
    left.loglog(distance, errors, style, label=name)
    right.semilogx(distance, angles, style, label=name)
for ax in (left, right):
    ax.set_xticks(distance, [f"{r}" for r in radii])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.set_xlabel("spectral radius ρ(J)")
left.set(ylabel="relative error", title="Error of the gradient", ylim=(1e-4, 3))
right.set(ylabel="degrees", title="Angle to the exact gradient")
left.legend(fontsize="small", ncols=2)
plt.show()

# %% [markdown]
# ## The bias in closed form
#
# The series of $k$ terms leaves out everything from the $k$-th on, which is $(J^\top)^k
# \lambda$. With $\rho = 0.9$ the slowest part of five terms has $0.9^5 = 59\,\%$
# missing.
#
# Since $\nabla_b \ell = \lambda$ here, the missing part can be compared directly.

# %%
weight = weight_of(0.9)


def gradient_b(adjoint):
    def value(b):
        sol = deqjax.fixed_point(
            fn, jnp.zeros(n), (weight, b), solver=solver, adjoint=adjoint, max_steps=300
        )
        return loss(sol.value)

    return jax.grad(value)(b)


z_star = jnp.linalg.solve(jnp.eye(n) - weight, b)
exact = jnp.linalg.solve((jnp.eye(n) - weight).T, jax.grad(loss)(z_star))
missing = {}
for k in (1, 5, 20):
    bias = gradient_b(deqjax.NeumannAdjoint(k)) - exact
    predicted = -jnp.linalg.matrix_power(weight.T, k) @ exact
    missing[k] = (
        float(jnp.linalg.norm(bias) / jnp.linalg.norm(exact)),
        float(jnp.linalg.norm(bias - predicted) / jnp.linalg.norm(exact)),
    )
    print(
        f"{k:2} terms: bias {missing[k][0]:.1%}, off the formula by {missing[k][1]:.0e}"
    )
same = gradient_b(deqjax.JFBAdjoint()) - gradient_b(deqjax.NeumannAdjoint(1))

# %% [markdown]
# ## Seeing it in a training
#
# The exact gradient is not known there. But what $\lambda$ leaves of the adjoint system
# is, for one more product: `relative_residual` of a `BackwardStats`. Near 1 or above,
# the gradient means little.


# %%
def residual(adjoint_of, radius):
    def value(args, probe):
        sol = deqjax.fixed_point(
            fn,
            jnp.zeros(n),
            args,
            solver=solver,
            adjoint=adjoint_of(probe),
            max_steps=300,
        )
        return loss(sol.value)

    args = (weight_of(radius), b)
    stats = jax.grad(value, argnums=1)(args, deqjax.BackwardStats())
    return float(stats.relative_residual)


seen = {
    radius: residual(lambda probe: deqjax.NeumannAdjoint(5, probe=probe), radius)
    for radius in (0.2, 0.9)
}
print({radius: f"{value:.1e}" for radius, value in seen.items()})

# %% [markdown]
# ## What this notebook claims
#
# A gradient to 1e-2 by GMRES takes two or three times the products of a series of five
# terms, and its error is bounded by the tolerance times the condition of $I - J$. SHINE
# falls back to JFB where its estimate would be too long, as here at $\rho = 0.9$.
# [Which gradient?](../docs/which-gradient.md) has the measurements on larger maps.

# %%
error = np.array([report.error for report in reports])  # (radii, adjoints)
names = list(adjoints)

# Every biased gradient gets worse as the radius grows.
for name in ("JFB", "5 terms"):
    assert np.all(np.diff(error[:, names.index(name)]) > 0)
assert error[0, names.index("5 terms")] < 1e-2
assert error[3, names.index("5 terms")] > 0.2
assert error[3, names.index("JFB")] > 0.3

# The tolerance of GMRES is what one gets, up to the condition of I − J.
condition = [(1 + radius) / (1 - radius) for radius in radii]
assert np.all(error[:, names.index("GMRES to 1e-2")] < 1e-2 * np.array(condition))

# The bias is (Jᵀ)ᵏ λ, and JFB is one term.
assert max(off for _, off in missing.values()) < 1e-6
assert missing[1][0] > missing[5][0] > missing[20][0]
assert float(jnp.max(jnp.abs(same))) < 1e-8

# The probe tells a good gradient from a bad one.
assert seen[0.2] < 1e-2 < 0.1 < seen[0.9]
