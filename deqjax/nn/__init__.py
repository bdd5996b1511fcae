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
from ._layers import count_parameters as count_parameters
from ._normalise import Contractive as Contractive, spectral_bound as spectral_bound
from ._revdeq_lm import RevDEQBlock as RevDEQBlock, RevDEQLM as RevDEQLM
from ._schedules import (
    Pretraining as Pretraining,
    draw_options as draw_options,
    unrolled as unrolled,
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
