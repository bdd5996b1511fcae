# %% [markdown]
# # Fixed points: when they exist, and how iteration fails
#
# A DEQ returns a state $z$ with $z = f(z)$. Three questions come before any training:
# is there such a state, is there only one, and does an iteration find it? This notebook
# answers them for maps that are small enough to be drawn, by theorem and by experiment,
# and shows the three ways in which iteration fails: divergence, oscillation, and
# several equilibria.
#
# There are exercises at the end, with solutions.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import deqjax

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Banach's theorem at work
#
# If $f$ maps a closed set into itself and contracts there, $\lVert f(x) - f(y) \rVert
# \le \kappa \lVert x - y \rVert$ with $\kappa < 1$, then it has exactly one fixed point
# in the set. The iteration $z_{k+1} = f(z_k)$ finds it from every start, and the
# distance is bounded by numbers that are known after the first step:
#
# $$ \lVert z_k - z^* \rVert \le \frac{\kappa^k}{1 - \kappa}
#    \lVert z_1 - z_0 \rVert . $$
#
# The map $f(z) = \cos z$ takes $[0, 1]$ into itself, and its slope there is at most
# $\kappa = \sin 1 \approx 0.84$. `Picard(None, None)` takes exactly `max_steps` steps
# and tests nothing.


# %%
def cosine(z, args):
    return jnp.cos(z)


def picard(fn, z0, args, steps, beta=1.0):
    """The iterates z_0, ..., z_steps."""
    solver = deqjax.Picard(None, None, beta=beta)
    solve = lambda n: (
        deqjax.fixed_point(
            fn, z0, args, solver=solver, max_steps=steps, options={"step_budget": n}
        ).value
    )
    return jax.vmap(solve)(jnp.arange(steps + 1))


tight = deqjax.Anderson(rtol=1e-14, atol=1e-14)
root = deqjax.fixed_point(cosine, jnp.array(0.5), solver=tight).value
iterates = picard(cosine, jnp.array(0.0), None, 40)
errors = jnp.abs(iterates - root)
kappa = float(jnp.sin(1.0))
bound = kappa ** jnp.arange(41) / (1 - kappa) * jnp.abs(iterates[1] - iterates[0])
rate = float(errors[30] / errors[29])
print(f"fixed point {root:.15f}")
print(f"error shrinks per step by {rate:.4f}, the slope there is {jnp.sin(root):.4f}")

# %% [markdown]
# The bound holds at every step, and is pessimistic: $\kappa$ is the worst slope on the
# whole interval, but near the fixed point only the slope *there* counts.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
grid = jnp.linspace(0, 1, 200)
left.plot(grid, jnp.cos(grid), label="cos z")
left.plot(grid, grid, color="0.5", label="z")
path = np.repeat(np.asarray(iterates), 2)
left.plot(path[:-1][:24], path[1:][:24], color="tab:red", lw=1, label="iteration")
left.set(xlabel="z", ylabel="f(z)", title="f(z) = cos z", xlim=(0, 1), ylim=(0, 1.05))
left.legend(loc="lower left")
right.semilogy(errors, label="error")
right.semilogy(bound, "--", label="Banach's bound")
right.set(xlabel="step k", ylabel="|zₖ − z*|", title="Error and its bound")
right.legend()
plt.show()

# %% [markdown]
# ## The affine map: condition and closed form
#
# For $f(z) = Wz + b$ everything is known. The fixed point solves a linear system, and
# the error is multiplied by $W$ in every step:
#
# $$ z^* = (I - W)^{-1} b, \qquad z_k - z^* = W^k (z_0 - z^*) . $$
#
# So the fixed point exists and is unique when 1 is no eigenvalue of $W$; and iteration
# converges from every start **if and only if the spectral radius** $\rho(W)$, the
# largest modulus of an eigenvalue, **is below 1**. Below 1 in *norm* is more than is
# needed, and it is what makes the error fall in every single step.


# %%
def affine(z, args):
    weight, b = args
    return weight @ z + b


n = 32
orthogonal = jnp.linalg.qr(jr.normal(jr.key(0), (n, n)))[0]
b = jr.normal(jr.key(1), (n,))
symmetric = orthogonal @ jnp.diag(jnp.linspace(-0.9, 0.9, n)) @ orthogonal.T
# Eigenvalues of at most 0.5, but each entry also hears its neighbour.
chain = jnp.diag(jnp.linspace(-0.5, 0.5, n)) + 0.7 * jnp.eye(n, k=1)
maps = {"symmetric": symmetric, "chain": chain}

paths, closed = {}, {}
for name, weight in maps.items():
    closed[name] = jnp.linalg.solve(jnp.eye(n) - weight, b)
    worst = jnp.linalg.svd(weight)[2][0]  # the direction that W stretches most
    paths[name] = picard(affine, closed[name] + worst, (weight, b), 150)
    radius = jnp.max(jnp.abs(jnp.linalg.eigvals(weight)))
    print(f"{name:10} ρ = {radius:.2f}, norm = {jnp.linalg.norm(weight, 2):.2f}")

# %% [markdown]
# The chain has the smaller radius and the larger norm. Its error grows before it falls.
# On a trained model nobody knows the eigenvalues, and `contraction_report` measures
# both numbers, from Jacobian products alone:

# %%
report = deqjax.diagnostics.contraction_report(affine, closed["chain"], (chain, b))
report

# %% [markdown]
# ## Three failures
#
# 1. **Divergence**: one eigenvalue at 1.1. There is still exactly one fixed point, but
#    iteration walks away from it.
# 2. **Oscillation**: one eigenvalue at −1.2. The iterates jump from side to side,
#    farther each time.
# 3. **Several equilibria**: $f(z) = \tanh(2z + b)$ crosses the diagonal three times,
#    and which crossing is found depends on the start.
#
# The first two are failures of the *iteration* and have remedies: damping, $z
# \leftarrow (1-\beta) z + \beta f(z)$, turns each eigenvalue $\mu$ into $1 - \beta +
# \beta\mu$, which helps where $\mu < -1$ and cannot help where $\mu > 1$. Anderson
# acceleration and Newton's method find fixed points that repel. The third is a property
# of the *map*.


# %%
def with_eigenvalue(mu):
    spread = jnp.linspace(-0.5, 0.5, n).at[0].set(mu)
    return orthogonal @ jnp.diag(spread) @ orthogonal.T


solvers = {
    "Picard": deqjax.Picard(),
    "Picard, β = 0.8": deqjax.Picard(beta=0.8),
    "Anderson": deqjax.Anderson(),
    "NewtonKrylov": deqjax.NewtonKrylov(),
}
works = {}
for mu in (1.1, -1.2):
    weight = with_eigenvalue(mu)
    exact = jnp.linalg.solve(jnp.eye(n) - weight, b)
    for name, solver in solvers.items():
        sol = deqjax.fixed_point(
            affine, jnp.zeros(n), (weight, b), solver=solver, max_steps=200
        )
        error = jnp.linalg.norm(sol.value - exact) / jnp.linalg.norm(exact)
        works[mu, name] = bool(sol.result == optx.RESULTS.successful)
        print(f"eigenvalue {mu:4}: {name:16} {works[mu, name]!s:6} error {error:.0e}")

# %% [markdown]
# Now the map with three equilibria. The outer two attract and the one between them
# repels: Picard iteration never ends there, Newton's method does when it starts nearby.
# A network whose cell can do this has an output that depends on where its solve starts,
# and possibly on the solver.


# %%
def scalar(z, args):
    w, b = args
    return jnp.tanh(w * z + b)


starts = jnp.linspace(-1, 1, 101)
solve = jax.vmap(
    lambda z0, solver: deqjax.fixed_point(scalar, z0, (2.0, 0.1), solver=solver).value,
    in_axes=(0, None),
)
found_picard = solve(starts, deqjax.Picard(1e-10, 1e-10))
found_newton = solve(starts, deqjax.NewtonKrylov(1e-10, 1e-10))
print("Picard finds ", np.unique(np.round(found_picard, 6)))
print("Newton finds ", np.unique(np.round(found_newton, 6)))

# %%
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
axes[0].set(title="ρ is not the norm", xlabel="step", ylabel="relative error")
for name, path in paths.items():
    distance = jnp.linalg.norm(path - closed[name], axis=1)
    axes[0].semilogy(distance / distance[0], label=name)
axes[0].set_ylim(bottom=1e-10)
axes[1].set(title="Divergence and oscillation", xlabel="step", ylabel="a coordinate")
for mu, beta in ((1.1, 1.0), (-1.2, 1.0), (-1.2, 0.8)):
    weight = with_eigenvalue(mu)
    exact = jnp.linalg.solve(jnp.eye(n) - weight, b)
    path = picard(affine, exact + orthogonal[:, 0], (weight, b), 15, beta)
    label = f"eigenvalue {mu}" + (f", β = {beta}" if beta < 1 else "")
    axes[1].plot((path - exact) @ orthogonal[:, 0], ".-", label=label)
axes[2].plot(starts, found_picard, ".", label="Picard")
axes[2].plot(starts, found_newton, "x", ms=4, label="Newton–Krylov")
axes[2].set(title="Three equilibria", xlabel="start", ylabel="fixed point found")
axes[2].set_ylim(-1.9, 1.1)
for ax in axes:
    ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## What spectral normalisation changes
#
# tanh has slopes of at most 1, so $f(z) = \tanh(Wz + Ux + b)$ contracts with factor
# $\lVert W \rVert_2$. `deqjax.nn.Contractive` divides the weight by a bound of that
# norm wherever it exceeds `kappa`. Then there is one equilibrium, from every start.
# That is a loss, too: a map with one equilibrium per input has nothing to choose from.
# Spectral normalisation makes a DEQ well posed by ruling out the behaviour of the
# figure on the right.

# %%

layer = eqx.nn.Linear(n, n, key=jr.key(2))
layer = eqx.tree_at(
    lambda t: t.weight, layer, 3 * jr.normal(jr.key(3), (n, n)) / n**0.5
)


def cell(z, layer):
    return jnp.tanh(layer(z))


def spread_of_answers(layer):
    """Solutions from 20 starts, the part that converged, and their spread."""
    solver = deqjax.Picard(1e-8, 1e-8)
    solve = lambda z0: deqjax.fixed_point(cell, z0, layer, solver=solver, max_steps=500)
    sols = jax.vmap(solve)(jr.normal(jr.key(4), (20, n)))
    return sols.stats["converged"].mean(), jnp.max(jnp.std(sols.value, axis=0))


for name, candidate in {
    "free": layer,
    "contractive": deqjax.nn.Contractive(layer, 0.9),
}.items():
    part, spread = spread_of_answers(candidate)
    print(f"{name:12} converged {part:4.0%}, spread of the answers {spread:.1e}")

# %% [markdown]
# ## Exercises
#
# 1. How many Picard steps does $f(z) = Wz + b$ need to reduce every error by $10^{-6}$,
#    if $W$ is symmetric with spectral radius 0.9? Predict, then count.
# 2. All eigenvalues of $W$ are real and lie in $[-3, 0.5]$. For which $\beta$ does
#    damped iteration converge, which is best, and what is its rate?
# 3. For which $w > 0$ has $f(z) = \tanh(wz)$ more than one fixed point?
#
# ## Solutions
#
# **1.** The error after $k$ steps is at most $0.9^k$ of the first one, and no less
# along the leading eigenvector, so $k = \lceil \log 10^{-6} / \log 0.9 \rceil = 132$.

# %%
predicted = int(np.ceil(np.log(1e-6) / np.log(0.9)))
along = jnp.linalg.eigh(symmetric)[1][:, -1]
path = picard(affine, closed["symmetric"] + along, (symmetric, b), 150)
distance = jnp.linalg.norm(path - closed["symmetric"], axis=1)
counted = int(jnp.argmax(distance <= 1e-6))
print(predicted, counted)

# %% [markdown]
# **2.** Damping moves an eigenvalue $\mu$ to $1 - \beta(1 - \mu)$. Here $1 - \mu$ lies
# in $[0.5, 4]$, so that iteration converges for $0 < \beta < 2/4$. The rate $\max(|1 -
# 0.5\beta|, |1 - 4\beta|)$ is least where both are equal: $\beta = 2 / (0.5 + 4) =
# 4/9$, with rate $(4 - 0.5)/(4 + 0.5) = 7/9$.

# %%
spread = orthogonal @ jnp.diag(jnp.linspace(-3, 0.5, n)) @ orthogonal.T
exact = jnp.linalg.solve(jnp.eye(n) - spread, b)
rates = {}
for beta in (0.3, 4 / 9, 0.49, 0.51):
    path = picard(affine, jnp.zeros(n), (spread, b), 60, beta)
    distance = jnp.linalg.norm(path - exact, axis=1)
    rates[beta] = float((distance[60] / distance[40]) ** (1 / 20))
    print(f"β = {beta:.3f}: rate {rates[beta]:.4f}")

# %% [markdown]
# **3.** For $w \le 1$ only 0: the slope of $\tanh(wz)$ is below $w \le 1$ everywhere
# but at 0, so that it meets the diagonal once. For $w > 1$ the slope at 0 is above 1,
# and since tanh stays below 1 there is another crossing on each side. At $w = 1$ the
# single fixed point is not hyperbolic: iteration converges, but more slowly than any
# geometric sequence.

# %%
count = {}
for w in (0.9, 1.5):
    values = jax.vmap(
        lambda z0, w=w: (
            deqjax.fixed_point(
                scalar, z0, (w, 0.0), solver=deqjax.Picard(1e-12, 1e-12), max_steps=2000
            ).value
        )
    )(jnp.array([-1.0, 0.0, 1.0]))
    count[w] = len(np.unique(np.round(values, 6)))
slow = picard(scalar, jnp.array(1.0), (1.0, 0.0), 1000)
print(count, f"w = 1: {slow[100]:.3f} after 100 steps, {slow[1000]:.3f} after 1000")

# %% [markdown]
# ## What this notebook claims

# %%
# Banach: the bound holds, and the rate is the slope at the fixed point.
assert bool(jnp.all(errors <= bound))
assert abs(rate - float(jnp.sin(root))) < 1e-3

# Affine maps: iteration ends at the closed form, whatever the norm.
for name, path in paths.items():
    assert jnp.linalg.norm(path[-1] - closed[name]) < 1e-5
growth = jnp.linalg.norm(paths["chain"] - closed["chain"], axis=1)
assert jnp.max(growth) > 1.1 * growth[0]
assert abs(float(report.norm) - float(jnp.linalg.norm(chain, 2))) < 1e-3

# Divergence and oscillation, and what mends them.
assert not works[1.1, "Picard"]
assert not works[1.1, "Picard, β = 0.8"]
assert works[1.1, "Anderson"]
assert works[1.1, "NewtonKrylov"]
assert not works[-1.2, "Picard"]
assert works[-1.2, "Picard, β = 0.8"]

# Several equilibria: two attract, Newton's method also finds the third.
assert len(np.unique(np.round(found_picard, 6))) == 2
assert len(np.unique(np.round(found_newton, 6))) == 3

# A contraction has one.
assert spread_of_answers(layer)[0] < 1
part, spread_bounded = spread_of_answers(deqjax.nn.Contractive(layer, 0.9))
assert part == 1
assert spread_bounded < 1e-6

# The exercises.
assert abs(counted - predicted) <= 1
assert rates[0.51] > 1 > rates[0.49]
assert min(rates, key=rates.get) == 4 / 9
assert abs(rates[4 / 9] - 7 / 9) < 1e-3
assert count == {0.9: 1, 1.5: 3}
