"""Published architectures, all with the interface of `AbstractModel`.

Language models take tokens, image models images. `Model.published(name, key=key)` makes
a published configuration, `Model.configurations` lists them.
"""

from ._interface import AbstractModel as AbstractModel
from .language import (
    AbstractLanguageModel as AbstractLanguageModel,
    DEQTransformerLM as DEQTransformerLM,
    KVCache as KVCache,
    RevDEQLM as RevDEQLM,
    SegmentMemory as SegmentMemory,
    TransformerLM as TransformerLM,
    generate as generate,
)
from .vision import (
    ImplicitResNet as ImplicitResNet,
    MDEQBackbone as MDEQBackbone,
    MDEQClassifier as MDEQClassifier,
    MDEQSegmenter as MDEQSegmenter,
    MonotoneClassifier as MonotoneClassifier,
    RevDEQClassifier as RevDEQClassifier,
)
