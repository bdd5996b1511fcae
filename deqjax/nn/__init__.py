"""Layers and models."""

from ._deq import DEQ as DEQ, RevDEQ as RevDEQ
from ._mdeq import MDEQClassifier as MDEQClassifier
from ._mdeq_cell import MDEQCell as MDEQCell
from ._mdeq_segmenter import MDEQSegmenter as MDEQSegmenter
