"""Errors that a user can mend: one line with the fault and the remedy."""

import re

_LONGEST = 290
"""Most characters of an error's text, so that it stays below 300 behind the command line's "error: "."""


class PalError(ValueError):
    """Base class of errors caused by input; the command line prints it as one line and exits with 1.

    The message becomes one printable line of at most 290 characters. A longer one gets "…" in place of its middle,
    since the name is at its start and the remedy at its end.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message), _LONGEST))


class AudioWarning(UserWarning):
    """A clip of unknown length was read to the end of its file, because `read_to_end` was set."""


class WeightsWarning(UserWarning):
    """A bundle was loaded on an LLM or encoder with other weights, because `other_weights` was set."""


class AudioError(PalError):
    """Audio that cannot be used; names the file, the fault and the remedy."""


class ConfigError(PalError):
    """A configuration that cannot be used; names the key and the known ones."""


class ManifestError(PalError):
    """A manifest or one of its records that cannot be used; names file and line."""


class BundleError(PalError):
    """A saved model, checkpoint, audio index or feature cache that cannot be used; names the file."""


class TrainingError(PalError):
    """A run that cannot go on: too many bad clips or steps that are not finite, or a disk that cannot be written."""


class DownloadError(PalError):
    """A model that could not be downloaded; names the package or Hub id, the reason and the remedy."""


class PromptError(PalError):
    """A conversation that cannot be used, such as a placeholder without a clip."""


def first_sentence(error: Exception) -> str:
    """First sentence of another library's error, shortened for a one-line message."""
    text = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".:")
    return text[:160] or type(error).__name__


def shortened(text: str, longest: int, space: str = " ") -> str:
    """The text on one printable line of at most `longest` characters, with "…" for the middle of a longer one.

    White space other than a blank becomes `space`; other characters that cannot be printed become "?".
    """
    if len(text) > longest:
        end = longest // 2
        text = f"{text[: longest - end - 1]}…{text[-end:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else space if c.isspace() else "?" for c in text)
