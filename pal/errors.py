"""Errors that a user can mend: one line, what is wrong and the remedy."""


class PalError(ValueError):
    """Base of every error caused by input; the command line prints it as one line and exits with 1."""


class AudioError(PalError):
    """Audio that cannot be used; names the file, the fault and the remedy."""


class ConfigError(PalError):
    """A configuration that cannot be used; names the key and the known ones."""


class ManifestError(PalError):
    """A manifest or one of its records that cannot be used; names file and line."""


class BundleError(PalError):
    """A saved model, checkpoint, audio index or feature cache that cannot be used; names the file."""


class PromptError(PalError):
    """A conversation that cannot be used, such as a placeholder without a clip."""
