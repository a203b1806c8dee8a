"""What this package raises when an artifact, not the code, is at fault."""


class ArtifactError(ValueError):
    """An artifact that cannot be used or written: what is wrong, where, and what to do."""
