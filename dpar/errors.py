"""What the library raises when a user's input, not the code, is at fault: one message that says what to do."""


class ModelError(ValueError):
    """A model, checkpoint or model input that cannot be used, and why."""
