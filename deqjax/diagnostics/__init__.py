"""Reports on a map, its fixed point, its solvers and its gradients."""

from ._contraction import (
    ContractionReport as ContractionReport,
    contraction_report as contraction_report,
)
from ._coupling import (
    CouplingReport as CouplingReport,
    coupling_report as coupling_report,
)
from ._depth import DepthReport as DepthReport, depth_report as depth_report
from ._gradients import (
    GradientReport as GradientReport,
    gradient_report as gradient_report,
)
from ._lipschitz import LipschitzReport as LipschitzReport, lipschitz as lipschitz
from ._solvers import SolverReport as SolverReport, solver_report as solver_report
from ._spectrum import (
    SingularValues as SingularValues,
    Spectrum as Spectrum,
    singular_values as singular_values,
    spectrum as spectrum,
)
from ._summary import summary as summary
