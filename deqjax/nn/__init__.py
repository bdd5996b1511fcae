"""Layers and models."""

from ._deq import DEQ as DEQ, RevDEQ as RevDEQ
from ._hyper import HyperDEQ as HyperDEQ, HyperNetwork as HyperNetwork
from ._implicit_resnet import (
    ImplicitResNet as ImplicitResNet,
    ImplicitResNetCell as ImplicitResNetCell,
)
from ._mdeq import MDEQClassifier as MDEQClassifier
from ._mdeq_cell import MDEQCell as MDEQCell
from ._mdeq_segmenter import MDEQSegmenter as MDEQSegmenter
from ._monotone import (
    AbstractMonotone as AbstractMonotone,
    MonotoneConv as MonotoneConv,
    MonotoneDense as MonotoneDense,
)
from ._monotone_deq import (
    AbstractSplitting as AbstractSplitting,
    ForwardBackward as ForwardBackward,
    MonotoneClassifier as MonotoneClassifier,
    MonotoneDEQ as MonotoneDEQ,
    PeacemanRachford as PeacemanRachford,
)
from ._ode import NeuralODE as NeuralODE, SteadyStateODE as SteadyStateODE
from ._revdeq_images import ConvCell as ConvCell, RevDEQClassifier as RevDEQClassifier
