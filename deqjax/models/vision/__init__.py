"""Image models."""

from ._implicit_resnet import ImplicitResNet as ImplicitResNet
from ._mdeq import MDEQClassifier as MDEQClassifier
from ._mdeq_backbone import MDEQBackbone as MDEQBackbone
from ._mdeq_segmenter import MDEQSegmenter as MDEQSegmenter
from ._monotone import MonotoneClassifier as MonotoneClassifier
from ._revdeq import RevDEQClassifier as RevDEQClassifier
