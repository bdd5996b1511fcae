"""Layers, and cells of published architectures.

The architectures themselves are in `deqjax.models`. Names that have moved there still
work here, without a warning: `Cache` (now `deqjax.models.KVCache`), `DEQTransformerLM`,
`ImplicitResNet`, `MDEQClassifier`, `MDEQSegmenter`, `Memory` (now
`deqjax.models.SegmentMemory`), `MonotoneClassifier`, `RevDEQClassifier`, `RevDEQLM`,
`TransformerLM` and `generate`.
"""

import importlib
from typing import Any as _Any

from ._adaptive import (
    AdaptiveEmbedding as AdaptiveEmbedding,
    AdaptiveSoftmax as AdaptiveSoftmax,
)
from ._conv_cell import ConvCell as ConvCell
from ._deq import DEQ as DEQ, RevDEQ as RevDEQ
from ._deq_transformer import DEQTransformerBlock as DEQTransformerBlock
from ._dropout import VariationalDropout as VariationalDropout
from ._hyper import HyperDEQ as HyperDEQ, HyperNetwork as HyperNetwork
from ._implicit_resnet_cell import ImplicitResNetCell as ImplicitResNetCell
from ._mdeq_cell import MDEQCell as MDEQCell
from ._monotone import (
    AbstractMonotone as AbstractMonotone,
    MonotoneConv as MonotoneConv,
    MonotoneDense as MonotoneDense,
)
from ._monotone_deq import MonotoneDEQ as MonotoneDEQ
from ._normalise import Contractive as Contractive, spectral_bound as spectral_bound
from ._ode import NeuralODE as NeuralODE, SteadyStateODE as SteadyStateODE
from ._parameters import (
    count_parameters as count_parameters,
    trainable as trainable,
)
from ._revdeq_block import RevDEQBlock as RevDEQBlock
from ._schedules import (
    Pretraining as Pretraining,
    draw_options as draw_options,
    unrolled as unrolled,
)
from ._splittings import (
    AbstractSplitting as AbstractSplitting,
    ForwardBackward as ForwardBackward,
    PeacemanRachford as PeacemanRachford,
)
from ._starts import (
    LearnedStart as LearnedStart,
    NoisyStart as NoisyStart,
    solve_stream as solve_stream,
)
from ._transformer_block import TransformerBlock as TransformerBlock

_MOVED = {
    "Cache": "KVCache",
    "Memory": "SegmentMemory",
    **{
        name: name
        for name in (
            "DEQTransformerLM",
            "ImplicitResNet",
            "MDEQClassifier",
            "MDEQSegmenter",
            "MonotoneClassifier",
            "RevDEQClassifier",
            "RevDEQLM",
            "TransformerLM",
            "generate",
        )
    },
}


def __getattr__(name: str) -> _Any:
    # Imported when asked for: layers do not depend on models.
    if name in _MOVED:
        return getattr(importlib.import_module("deqjax.models"), _MOVED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
