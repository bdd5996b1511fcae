"""Sudokus of four by four with a single solution, of which every clue is needed."""

import functools as ft
import itertools

import numpy as np

# The row, the column and the box of each of the 16 cells.
UNITS = tuple(
    tuple(unit(row, column) for row, column in itertools.product(range(4), repeat=2))
    for unit in (
        lambda row, column: row,
        lambda row, column: column,
        lambda row, column: 2 * (row // 2) + column // 2,
    )
)


@ft.cache
def solved_grids() -> np.ndarray:
    """All 288 solved grids, as rows of 16 digits from 1 to 4."""
    rows = list(itertools.permutations(range(1, 5)))
    found = []
    for four in itertools.product(rows, repeat=4):
        columns = zip(*four, strict=True)
        if all(len(set(column)) == 4 for column in columns):
            grid = np.array(four)
            boxes = grid.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
            if all(len(set(box)) == 4 for box in boxes.tolist()):
                found.append(grid.ravel())
    return np.array(found, np.int32)


def split_grids(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Solved grids to train on, and a fifth of all that is held out."""
    grids = solved_grids()
    order = np.random.default_rng(seed).permutation(len(grids))
    cut = len(grids) // 5
    return grids[order[cut:]], grids[order[:cut]]


def count_solutions(puzzles: np.ndarray) -> np.ndarray:
    """How many solutions each puzzle (batch, 16) has, 0 marking an empty cell."""
    given = puzzles[:, None, :]
    fits = (given == 0) | (given == solved_grids())
    return np.all(fits, axis=-1).sum(axis=-1)


def draw_puzzles(
    grids: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Puzzles (size, 16) with their solutions.

    Cells of a grid are emptied in random order wherever the solution stays the only
    one, so that in the end no clue can be spared.
    """
    solutions = grids[rng.integers(len(grids), size=size)]
    puzzles = solutions.copy()
    order = rng.permuted(np.tile(np.arange(16), (size, 1)), axis=1)
    every = np.arange(size)
    for cells in order.T:
        tried = puzzles.copy()
        tried[every, cells] = 0
        unique = count_solutions(tried) == 1
        puzzles = np.where(unique[:, None], tried, puzzles)
    return puzzles, solutions
