"""Layers and models."""

from ._adaptive import (
    AdaptiveEmbedding as AdaptiveEmbedding,
    AdaptiveSoftmax as AdaptiveSoftmax,
)
from ._deq import DEQ as DEQ, RevDEQ as RevDEQ
from ._deq_transformer import DEQTransformerBlock as DEQTransformerBlock
from ._deq_transformer_lm import (
    DEQTransformerLM as DEQTransformerLM,
    Memory as Memory,
)
from ._dropout import VariationalDropout as VariationalDropout
from ._generation import Cache as Cache, generate as generate
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
    MonotoneClassifier as MonotoneClassifier,
    MonotoneDEQ as MonotoneDEQ,
)
from ._normalise import Contractive as Contractive, spectral_bound as spectral_bound
from ._ode import NeuralODE as NeuralODE, SteadyStateODE as SteadyStateODE
from ._parameters import (
    count_parameters as count_parameters,
    trainable as trainable,
)
from ._revdeq_images import ConvCell as ConvCell, RevDEQClassifier as RevDEQClassifier
from ._revdeq_lm import RevDEQBlock as RevDEQBlock, RevDEQLM as RevDEQLM
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
from ._transformer_lm import (
    TransformerBlock as TransformerBlock,
    TransformerLM as TransformerLM,
)
