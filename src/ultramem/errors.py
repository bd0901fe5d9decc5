"""Errors meant for the person who runs ultramem: each says what was given, what is allowed and what to do."""


class UltraMemError(Exception):
    """Base of all errors that the command line prints as one line instead of a traceback."""


class ConfigError(UltraMemError, ValueError):
    """A configuration names an unknown field, or a value that the field does not take."""


class DataError(UltraMemError):
    """Input text, a token file or a data folder cannot be used."""


class CheckpointError(UltraMemError):
    """A path does not hold the model folder or run folder that was expected, or its content is damaged."""


class TrainingError(UltraMemError):
    """A run cannot go on: its loss or its gradient is no finite number."""


class BackendError(UltraMemError):
    """Kernels that were asked for by name cannot run here."""


class PeerError(UltraMemError):
    """Another project's package that a benchmark compares with is not installed, or does not load."""
