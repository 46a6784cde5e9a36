"""Named errors. Each message says what is wrong and what to do about it."""

from __future__ import annotations


class SurgeonError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        cause: What is wrong, in one sentence, with the offending value.
        remedy: What the user can do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[SurgeonError], tuple[str, str]]:
        """Make the error anew from its two sentences, when a process hands it to others."""
        return type(self), (self.cause, self.remedy)


class ConfigError(SurgeonError):
    """A recipe or an option has a value that cannot be used."""


class DataError(SurgeonError):
    """Text or tokens are missing, unreadable or too few."""


class DownloadError(SurgeonError):
    """A demo asset could not be fetched, or its checksum is wrong."""


class ModelError(SurgeonError):
    """A model cannot be found or loaded."""


class UnsupportedModelError(ModelError):
    """The architecture has no entry in ``llm_surgeon.models``, or breaks an assumption of its entry."""


class TargetError(SurgeonError):
    """A run that misses its sparsity by more than one candidate's weights."""


class OutputError(SurgeonError):
    """The output directory cannot be used."""


class DiskSpaceError(OutputError):
    """The target file system has too little room for the export."""


class NonFiniteError(SurgeonError):
    """Activations, gradients or curvature sums hold NaN or infinity."""


class NotPositiveDefiniteError(SurgeonError):
    """A damped factor has no Cholesky decomposition even after escalating its damping."""


class ExportMismatchError(SurgeonError):
    """The reloaded export does not compute what the model in memory computes."""


class ComparisonError(SurgeonError):
    """A comparison cannot start or go on."""


class ProcessError(SurgeonError):
    """Another process of the run has ended, or cannot be reached."""


class UploadError(SurgeonError):
    """The hub cannot be reached, or refuses a repository."""


class RecoveryError(SurgeonError):
    """Training has not made a model better."""
