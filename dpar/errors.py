"""The library's error for invalid user input, as opposed to bugs: one message that says what to do."""


class ModelError(ValueError):
    """A model, checkpoint or model input cannot be used."""
