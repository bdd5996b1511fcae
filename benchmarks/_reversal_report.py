"""The measurements of `reversal.py` as Markdown and as a figure."""

import itertools
import math
import pathlib
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

RECORDS = ("16 bits", "8 bits", "4 bits")


class Unit(NamedTuple):
    """A kind of unit of a float32 state, with so many bits and so large a β.

    Attributes:
        modulus: what is recorded of an integer is its remainder modulo this.
        finest: binary digits from the size that the unit follows to the finest unit.
        expected: the difference of two evaluations, in finest units, for which half of
            the capacity has to suffice.
        beta: the weight on f.
    """

    modulus: int
    finest: int
    expected: float
    beta: float

    @property
    def size(self) -> float:
        """The unit, relative to the size that it follows."""
        needed = (0.5 + self.expected * self.beta) / (1 - self.beta)
        coarser = max(0, math.ceil(math.log2(needed / (self.modulus / 4))))
        return 2.0 ** (coarser - self.finest)

    @property
    def tolerated(self) -> float:
        """The difference of two evaluations that fills the capacity."""
        rounding = 0.5 * 2.0**-self.finest
        capacity = self.modulus / 2 * self.size
        return (capacity * (1 - self.beta) - rounding) / self.beta


def units(bits: int, beta: float) -> tuple[Unit, Unit]:
    """Of a row's typical entries, and of its outliers."""
    shared = Unit(3 * 2 ** (bits - 2), 21, 16.0, beta)
    return shared, Unit(2 ** (bits - 3), 24, 8.0, beta)


def _grid(head: list[str], body: list[list[str]]) -> list[str]:
    line = lambda entries: f"| {' | '.join(entries)} |"
    return [line(head), "|" + "---|" * len(head), *map(line, body)]


def _errors(results: dict[str, Any]) -> list[str]:
    """Gradient errors, drifts and largest repairs."""
    head = ["map", "β", "N", *RECORDS, "no record", "backpropagation"]
    head += ["drift: 16 and 8 bits", "4 bits", "no record"]
    head += ["largest repair: 16 bits", "8 bits"]
    body = []
    for row in results["errors"]:
        if row["steps"] not in (4, 16, 64):
            continue
        methods = (*RECORDS, "no record", "backpropagation")
        drifts = {name: row[f"drift, {name}"] for name in methods[:-1]}
        both = max(drifts["16 bits"], drifts["8 bits"])
        body.append(
            [
                row["map"],
                str(row["beta"]),
                str(row["steps"]),
                *(f"{row[name]:.0e}" for name in methods),
                *(_drift(x) for x in (both, drifts["4 bits"], drifts["no record"])),
                *(f"{row[f'repair, {name}']:.3f}" for name in RECORDS[:2]),
            ]
        )
    return _grid(head, body)


def _drift(drift: float) -> str:
    return f"{drift:.0e}" if drift else "0"


def _tolerance(results: dict[str, Any]) -> list[str]:
    """By the formula, and as measured."""
    head = ["bits", "β", "row's unit / typical size", "tolerated / typical size"]
    head += ["own unit / outlier", "tolerated / outlier", "measured / typical size"]
    body = []
    for bits in (4, 8, 16):
        for beta in sorted({row["beta"] for row in results["tolerance"]}):
            rows = [
                row
                for row in results["tolerance"]
                if row["bits"] == bits and row["beta"] == beta
            ]
            sound = itertools.takewhile(lambda row: row["drift"] == 0, rows)
            most = max((row["noise"] for row in sound), default=None)
            shown = [x for u in units(bits, beta) for x in (u.size, u.tolerated)]
            entries = [f"{x:.0e}" for x in shown]
            entries.append("–" if most is None else f"{most:.0e}")
            body.append([str(bits), str(beta), *entries])
    return _grid(head, body)


def _memory(results: dict[str, Any]) -> list[str]:
    """Copies of the state that one more step takes."""
    kinds = ("4 bits", "8 bits", "16 bits", "states", "activations")
    head = ["cell", "shape of z", *kinds[:3], "the two states", "activations"]
    body = [
        [
            row["cell"],
            "×".join(map(str, row["shape"])),
            *(f"{row[kind]:.2f}" for kind in kinds[:-1]),
            f"{row['activations']:.0f}",
        ]
        for row in results["memory"]
    ]
    return _grid(head, body)


def _times(results: dict[str, Any]) -> list[str]:
    """Gradients over their parts."""
    head = ["cell", "reversal / parts", "backpropagation / parts", "parts, ms"]
    body = []
    for row in results["times"]:
        shown = []
        for method in ("reversal", "backpropagation"):
            low, high = row[f"{method}, quartiles"]
            shown.append(f"{row[method]:.2f} ({low:.2f} to {high:.2f})")
        body.append([row["cell"], *shown, f"{row['parts, ms']:.0f}"])
    return _grid(head, body)


def table(results: dict[str, Any]) -> str:
    """All tables, between the marks that the documentation includes them by."""
    sections = {
        "errors": _errors(results),
        "tolerance": _tolerance(results),
        "memory": _memory(results),
        "times": _times(results),
        "measured": [
            f"Measured on {results['device']} with JAX {results['jax']}, commit "
            f"{results['commit']}, in float32."
        ],
    }
    parts = [
        f"<!-- --8<-- [start:{name}] -->\n"
        + "\n".join(lines)
        + f"\n<!-- --8<-- [end:{name}] -->\n"
        for name, lines in sections.items()
    ]
    return "\n".join(parts)


def figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Gradient error against depth at β = 0.8; repairs against noise."""
    names = list(dict.fromkeys(row["map"] for row in results["errors"]))
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    styles = {
        "16 bits": "^:",
        "8 bits": "o-",
        "4 bits": "v:",
        "no record": "s--",
        "backpropagation": "k.",
    }
    for ax, name in zip(axes, names, strict=False):
        rows = [r for r in results["errors"] if r["map"] == name and r["beta"] == 0.8]
        steps = [row["steps"] for row in rows]
        for method, style in styles.items():
            values = np.array([row[method] for row in rows])
            values = np.where(np.isfinite(values), np.minimum(values, 1e3), np.nan)
            label = f"record of {method}" if "bits" in method else method
            ax.loglog(steps, values, style, label=label)
        ax.set_title(f"{name}, β = 0.8")
        ax.set_xlabel("steps N")
        ax.set_xticks(steps, [str(n) for n in steps])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[0].legend(fontsize=8)

    right = axes[-1]
    for i, (name, style) in enumerate(list(styles.items())[:3]):
        bits = int(name.split()[0])
        rows = [
            r for r in results["tolerance"] if r["bits"] == bits and r["beta"] == 0.8
        ]
        good = [row for row in rows if row["drift"] == 0]
        bad = [row for row in rows if row["drift"] > 0]
        for part, mark in ((good, style), (bad, "x")):
            at = [row["noise"] for row in part]
            label = f"record of {name}" if part is good else None
            right.loglog(
                at, [r["repair"] for r in part], mark, color=f"C{i}", label=label
            )
    right.plot([], [], "kx", label="drift reported")
    right.axhline(1, color="0.5", lw=0.8)
    right.set_title("post-norm block, β = 0.8, disturbed")
    right.set_xlabel("difference of two evaluations / typical size")
    right.set_ylabel("largest repair / capacity")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)
