"""Train language models: reversible DEQ, DEQ-Transformer, explicit transformer."""

from ._config import Config as Config
from ._errors import UsageError as UsageError
from ._train import load_run as load_run
