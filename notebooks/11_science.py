# %% [markdown]
# # Implicit layers in science
#
# Equilibria are older than networks. Three of them, each solved as a fixed point in
# float64, with gradients, and with a Hessian where one means something:
#
# 1. the steady state of a nonlinear partial differential equation;
# 2. a self-consistent field;
# 3. the prices of a market.
#
# Each has an independent check: a closed form, an identity, or finite differences.

# %%
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import deqjax

jax.config.update("jax_enable_x64", True)

adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-11))


def solve(fn, z0, args, solver):
    sol = deqjax.fixed_point(
        fn, z0, args, solver=solver, adjoint=adjoint, max_steps=200, throw=True
    )
    return sol.value


# %% [markdown]
# ## A steady state: the Bratu equation
#
# Heat that is produced by a reaction and leaves through the walls, $u'' + c\, e^u = 0$
# on $[0, 1]$ with $u = 0$ at both ends. With the inverse $G$ of $-d^2/dx^2$, the steady
# state is a fixed point, $u = G(c\, e^u)$. Below the critical $c^* \approx 3.514$ there
# are two solutions, and the cooler one attracts. Above it there is none: the reaction
# explodes.
#
# The exact solution is known, $u = 2 \log (\cosh(\theta/4) / \cosh((x -
# \tfrac12)\theta/2))$ with $\theta = \sqrt{2c} \cosh(\theta/4)$, and is itself a
# fixed-point problem for $\theta$.

# %%
n = 127
h = 1 / (n + 1)
grid = h * jnp.arange(1, n + 1)


def inverse_laplacian(source):
    """Solve -u'' = source with u = 0 at both ends, by a tridiagonal system."""
    side = -jnp.ones(n) / h**2
    lower, upper = side.at[0].set(0.0), side.at[-1].set(0.0)
    main = 2 * jnp.ones(n) / h**2
    system = jax.lax.linalg.tridiagonal_solve
    return system(lower, main, upper, source[:, None])[:, 0]


def bratu(u, c):
    return inverse_laplacian(c * jnp.exp(u))


anderson = deqjax.Anderson(1e-12, 1e-12, history=8)


def hottest(c):
    return jnp.max(solve(bratu, jnp.zeros(n), c, anderson))


def hottest_exact(c):
    equation = lambda theta, c: jnp.sqrt(2 * c) * jnp.cosh(theta / 4)
    theta = solve(equation, jnp.ones(()), c, deqjax.Anderson(1e-13, 1e-13))
    return 2 * jnp.log(jnp.cosh(theta / 4))


strengths = jnp.array([0.5, 1.0, 2.0, 3.0, 3.4])
value, slope = jax.vmap(jax.value_and_grad(hottest))(strengths)
exact, exact_slope = jax.vmap(jax.value_and_grad(hottest_exact))(strengths)
curvature = jax.grad(jax.grad(hottest))(2.0)
exact_curvature = jax.grad(jax.grad(hottest_exact))(2.0)
for row in zip(strengths, value, exact, slope, exact_slope, strict=True):
    print("c = {:.1f}: u = {:.5f} ({:.5f}), du/dc = {:.4f} ({:.4f})".format(*row))
beyond = deqjax.fixed_point(bratu, jnp.zeros(n), 4.0, solver=anderson, max_steps=200)
print("c = 4.0 has a solution:", bool(beyond.result == optx.RESULTS.successful))

# %% [markdown]
# In brackets the exact values. What is left is the error of the grid, of the order
# $h^2$. The slope grows without bound towards $c^*$, where $I - J$ becomes singular.

# %% [markdown]
# ## A self-consistent field
#
# In the mean-field theory of magnets every spin feels the average of the others: $m_i =
# \tanh(\beta (\sum_j K_{ij} m_j + h_i))$. The solution minimises a free energy $F(m,
# h)$. So the first derivative of $F(m^*(h), h)$ is $-m^*$, and the second is the
# susceptibility, $\chi_{ij} = \partial m_i / \partial h_j = -\partial^2 F / \partial
# h_i \partial h_j$. Implicit differentiation should find the same matrix both ways, and
# a symmetric one.

# %%
spins = 12
coupling = jr.normal(jr.key(0), (spins, spins)) / spins
coupling = (coupling + coupling.T) / 2
coupling = coupling - jnp.diag(jnp.diag(coupling))
field = 0.3 * jr.normal(jr.key(1), (spins,))
beta = 1.2


def mean_field(m, h):
    return jnp.tanh(beta * (coupling @ m + h))


def magnetisation(h):
    return solve(mean_field, jnp.zeros(spins), h, deqjax.Anderson(1e-13, 1e-13))


def free_energy(h):
    m = magnetisation(h)
    p, q = (1 + m) / 2, (1 - m) / 2
    entropy = -jnp.sum(p * jnp.log(p) + q * jnp.log(q))
    return -0.5 * m @ coupling @ m - h @ m - entropy / beta


m = magnetisation(field)
susceptibility = jax.jacfwd(magnetisation)(field)
hessian = -jax.jacfwd(jax.jacrev(free_energy))(field)
closed = jnp.linalg.inv(jnp.diag(1 / (beta * (1 - m**2))) - coupling)
print(
    f"gradient of F is -m    {jnp.max(jnp.abs(jax.grad(free_energy)(field) + m)):.0e}"
)
print(f"Hessian against dm/dh  {jnp.max(jnp.abs(hessian - susceptibility)):.0e}")
print(f"closed form            {jnp.max(jnp.abs(closed - susceptibility)):.0e}")

# %% [markdown]
# ## A market
#
# Six households own goods $w_{ik}$ and spend the share $a_{ik}$ of their income $\sum_l
# p_l w_{il}$ on good $k$. Prices are in equilibrium when demand equals supply. If
# prices follow demand, $p_k \leftarrow \sum_i a_{ik} \sum_l p_l w_{il} / \sum_i
# w_{ik}$, normalised to add up to 1, the fixed point is the equilibrium. How does a
# price react to a harvest? That is a derivative of the equilibrium with respect to
# endowments.

# %%
goods = 4
shares = jax.nn.softmax(jr.normal(jr.key(2), (6, goods)))
endowments = jnp.exp(0.5 * jr.normal(jr.key(3), (6, goods)))


def adjust(p, endowments):
    spending = shares.T @ (endowments @ p)
    new = spending / jnp.sum(endowments, axis=0)
    return new / jnp.sum(new)


def prices(endowments):
    equal = jnp.ones(goods) / goods
    return solve(adjust, equal, endowments, deqjax.Picard(1e-13, 1e-14))


p = prices(endowments)
excess = shares.T @ (endowments @ p) / p - jnp.sum(endowments, axis=0)
# The reaction of all prices to a larger harvest of good 0, shared by everybody.
harvest = endowments * jnp.zeros(goods).at[0].set(1.0)
_, reaction = jax.jvp(prices, (endowments,), (harvest,))
step = 1e-5
difference = prices(endowments + step * harvest) - prices(endowments - step * harvest)
difference = difference / (2 * step)
print("prices      ", np.round(p, 4))
print("d p / harvest", np.round(reaction, 4))

# %%
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
x = jnp.concatenate([jnp.zeros(1), grid, jnp.ones(1)])
for c in (1.0, 2.0, 3.4):
    u = solve(bratu, jnp.zeros(n), c, anderson)
    axes[0].plot(x, jnp.pad(u, 1), label=f"c = {c}")
axes[0].set(xlabel="position x", ylabel="temperature u", title="Bratu's steady state")
axes[0].legend()
image = axes[1].imshow(susceptibility, cmap="RdBu_r", vmin=-1, vmax=1)
figure.colorbar(image, ax=axes[1], shrink=0.8)
axes[1].set(xlabel="spin j", ylabel="spin i", title="Susceptibility ∂mᵢ/∂hⱼ")
axes[2].bar(np.arange(goods), 100 * reaction / p)
axes[2].axhline(0, color="0.5", lw=1)
axes[2].set(xlabel="good", ylabel="% of its price per 100 % harvest")
axes[2].set(title="Prices after a harvest of good 0", xticks=range(goods))
plt.show()

# %% [markdown]
# ## What this notebook claims

# %%
# Bratu: value, slope and curvature agree with the exact solution to the grid's error.
assert jnp.max(jnp.abs(value / exact - 1)) < 2e-3
assert jnp.max(jnp.abs(slope / exact_slope - 1)) < 2e-2
assert abs(curvature / exact_curvature - 1) < 1e-3
assert beyond.result != optx.RESULTS.successful

# The field: gradient and Hessian of the free energy, and the closed form.
assert jnp.max(jnp.abs(jax.grad(free_energy)(field) + m)) < 1e-9
assert jnp.max(jnp.abs(hessian - susceptibility)) < 1e-8
assert jnp.max(jnp.abs(closed - susceptibility)) < 1e-9
assert jnp.max(jnp.abs(susceptibility - susceptibility.T)) < 1e-9

# The market clears, and its reaction is that of finite differences.
assert jnp.max(jnp.abs(excess)) < 1e-9
assert jnp.max(jnp.abs(reaction - difference)) < 1e-8
assert reaction[0] < 0
