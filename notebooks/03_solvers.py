# %% [markdown]
# # Solvers compared
#
# All solvers look for the same thing, $f(z) = z$. They differ in what they remember:
# Picard iteration nothing, Anderson acceleration and Broyden's method the last few
# steps, Newton–Krylov the Jacobian, by products. Which one pays depends on the spectrum
# of the Jacobian. This notebook runs them on four maps whose spectra are known.

# %%
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import deqjax

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Four maps
#
# $f(z) = Wz + b$ with
#
# - a **fast** contraction: real eigenvalues between −0.3 and 0.3;
# - a **slow** one: real eigenvalues between −0.99 and 0.99;
# - a **repelling** one: one eigenvalue is 1.3, the others as in the fast one;
# - a **rotating** one: a multiple 0.95 of a rotation, with complex eigenvalues all
#   around a circle.

# %%
n = 64
rotation = jnp.linalg.qr(jr.normal(jr.key(0), (n, n)))[0]
b = jr.normal(jr.key(1), (n,))


def fn(z, args):
    weight, b = args
    return weight @ z + b


def real(eigenvalues):
    return rotation @ jnp.diag(eigenvalues) @ rotation.T


fast = jnp.linspace(-0.3, 0.3, n)
maps = {
    "fast": real(fast),
    "slow": real(jnp.linspace(-0.99, 0.99, n)),
    "repelling": real(fast.at[0].set(1.3)),
    "rotating": 0.95 * rotation,
}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
angle = np.linspace(0, 2 * np.pi, 200)
for ax, (name, weight) in zip(axes, maps.items(), strict=True):
    eigenvalues = jnp.linalg.eigvals(weight)
    ax.plot(np.cos(angle), np.sin(angle), color="0.6", lw=1)
    ax.plot(eigenvalues.real, eigenvalues.imag, ".")
    ax.set(title=name, aspect="equal", xlabel="real part of λ", xlim=(-1.4, 1.4))
axes[0].set_ylabel("imaginary part of λ")
plt.show()

# %% [markdown]
# ## Evaluations
#
# Every solver stops by the same test, here at a relative residual of $10^{-6}$. An
# evaluation is one call of $f$, and so is, about, a Jacobian product: `NewtonKrylov`
# counts its linearisations in `num_evals` and its products in `num_products`.

# %%
rtol = 1e-6
solvers = {
    "Picard": deqjax.Picard(rtol, 0.0),
    "Anderson, 5": deqjax.Anderson(rtol, 0.0, history=5),
    "Anderson, 20": deqjax.Anderson(rtol, 0.0, history=20),
    "Broyden, 20": deqjax.Broyden(rtol, 0.0, history=20),
    "Newton–Krylov": deqjax.NewtonKrylov(rtol, 0.0),
}
work, histories = {}, {}
for name, weight in maps.items():
    for label, solver in solvers.items():
        sol = deqjax.fixed_point(
            fn,
            jnp.zeros(n),
            (weight, b),
            solver=solver,
            max_steps=2000,
            options={"record": True},
        )
        evaluations = int(sol.stats["num_evals"])
        products = int(sol.stats.get("num_products") or 0)
        converged = bool(sol.stats["converged"])
        work[name, label] = evaluations + products if converged else None
        histories[name, label] = sol.stats["residual_history"][:evaluations]

print(" " * 15, *(f"{name:>10}" for name in maps))
for label in solvers:
    row = [work[name, label] or "–" for name in maps]
    print(f"{label:15}", *(f"{entry:>10}" for entry in row))

# %%
figure, axes = plt.subplots(
    1, 4, figsize=(10.5, 3.1), sharey=True, layout="constrained"
)
limits = {"fast": 20, "slow": 300, "repelling": 30, "rotating": 300}
for ax, name in zip(axes, maps, strict=True):
    for label in list(solvers)[:4]:
        history = histories[name, label]
        ax.semilogy(range(1, len(history) + 1), history, label=label)
    ax.set(title=name, xlabel="evaluations", xlim=(0, limits[name]), ylim=(1e-6, 1e4))
axes[0].set_ylabel("‖f(z) − z‖")
axes[0].legend(fontsize="small")
plt.show()

# %% [markdown]
# What to read from it:
#
# - On the **fast** map there is little to gain: what a solver adds to $f$ costs more
#   than the evaluations that it saves.
# - On the **slow** map memory pays, and the longer the history, the more.
# - The **repelling** fixed point is out of reach for Picard iteration, and no obstacle
#   for the others.
# - On the **rotating** map nothing beats Picard by much: eigenvalues all around a
#   circle leave nothing to extrapolate from.
#
# ## Time is not evaluations
#
# `solver_report` measures both on a map of one's own. With an $f$ as small as this one,
# the solver's own arithmetic dominates; for a network it hardly shows.

# %%
report = deqjax.diagnostics.solver_report(
    fn, jnp.zeros(n), (maps["slow"], b), solvers=solvers, max_steps=2000
)
report

# %% [markdown]
# ## What this notebook claims
#
# [Which solver?](../docs/which-solver.md) has more maps, other libraries, and memory.

# %%
# Fast: everything converges, and Picard needs about log(rtol) / log(ρ) evaluations.
predicted = np.log(rtol) / np.log(0.3)
assert all(work["fast", label] for label in solvers)
assert work["fast", "Picard"] <= predicted + 2

# Slow: memory pays, and more of it pays more.
assert work["slow", "Anderson, 5"] < work["slow", "Picard"] / 2
assert work["slow", "Anderson, 20"] < work["slow", "Anderson, 5"]

# Repelling: Picard fails, visibly, and the others do not.
assert work["repelling", "Picard"] is None
assert all(work["repelling", label] for label in list(solvers)[1:])

# Rotating: nobody gains half.
others = [work["rotating", label] for label in list(solvers)[1:]]
assert all(count is None or count > work["rotating", "Picard"] / 2 for count in others)
