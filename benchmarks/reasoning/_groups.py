"""Multiplication tables of the groups that words are made of."""

import itertools

import numpy as np

GROUPS = ("S3", "A5", "S5")


def group_table(name: str) -> np.ndarray:
    """The table of S3, A5 or S5: entry (a, b) is the element that applies a, then b.

    Elements are numbered in the lexical order of their permutations, so that 0 is the
    identity.
    """
    kind, degree = name[0], int(name[1:])
    elements = list(itertools.permutations(range(degree)))
    if kind == "A":
        elements = [p for p in elements if _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array(
        [[number[tuple(b[i] for i in a)] for b in elements] for a in elements],
        np.int32,
    )


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0
