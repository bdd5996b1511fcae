class UsageError(Exception):
    """A choice or data that cannot be used; the message names the option."""
