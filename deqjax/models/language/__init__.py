"""Language models, and text from them token by token."""

from ._deq_transformer_lm import (
    DEQTransformerLM as DEQTransformerLM,
    SegmentMemory as SegmentMemory,
)
from ._generation import KVCache as KVCache, generate as generate
from ._interface import AbstractLanguageModel as AbstractLanguageModel
from ._revdeq_lm import RevDEQLM as RevDEQLM
from ._transformer_lm import TransformerLM as TransformerLM
