"""Reports on a map, its fixed point, its solvers and its gradients."""

from ._spectrum import (
    SingularValues as SingularValues,
    Spectrum as Spectrum,
    singular_values as singular_values,
    spectrum as spectrum,
)
