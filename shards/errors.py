"""The error this package raises for a bad artifact, as opposed to a bug."""


class ArtifactError(ValueError):
    """An artifact cannot be used or written: the message says what, where, and what to do."""
