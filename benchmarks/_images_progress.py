"""What `train_images.py` shows of a training."""

from collections.abc import Mapping

import numpy as np


def describe(row: Mapping[str, float]) -> str:
    """Loss, accuracy, evaluations and residual in one line."""
    parts = [f"loss {row['loss']:.4f}", f"train {row['train_accuracy']:6.2%}"]
    if "test_accuracy" in row:
        parts.append(f"test {row['test_accuracy']:6.2%}")
    parts.append(f"{row['evaluations']:.1f} evals/image")
    if np.isfinite(row["residual"]):
        parts.append(f"residual {row['residual']:.1e}")
    if "seconds" in row:
        parts.append(f"{row['seconds']:.1f} s")
    return "  ".join(parts)
