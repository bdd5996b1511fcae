"""Train language models: reversible DEQ, DEQ-Transformer, explicit transformer."""
