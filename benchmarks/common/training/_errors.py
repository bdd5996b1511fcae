class TrainingError(Exception):
    """A training run that cannot continue; the message says why and what to try."""
