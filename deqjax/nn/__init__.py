"""Layers and models."""

from ._deq import DEQ as DEQ, RevDEQ as RevDEQ
