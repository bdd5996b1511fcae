"""Gradients of a solve; every one an `optimistix.AbstractAdjoint`."""

from ._implicit import ImplicitAdjoint as ImplicitAdjoint
from ._jfb import JFBAdjoint as JFBAdjoint
from ._neumann import NeumannAdjoint as NeumannAdjoint
from ._phantom import PhantomAdjoint as PhantomAdjoint
from ._reversible import ReversibleAdjoint as ReversibleAdjoint
from ._shine import ShineAdjoint as ShineAdjoint
from ._stats import BackwardStats as BackwardStats
from ._unrolled import UnrolledAdjoint as UnrolledAdjoint
