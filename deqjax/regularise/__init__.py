"""What is added to a loss so that equilibria are found, stable, and found early."""

from ._correction import (
    correction_points as correction_points,
    fixed_point_correction as fixed_point_correction,
    start_penalty as start_penalty,
)
from ._jacobian import (
    jacobian_norm as jacobian_norm,
    jacobian_spectral_norm as jacobian_spectral_norm,
)
