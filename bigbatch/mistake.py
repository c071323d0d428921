"""The exception for a user's mistake."""


class Mistake(ValueError):
    """The command line, the config or the data are wrong. The text, one line, says what to change.

    Commands print only this text and end with status 2. Any other exception is a bug, of this
    package or of the user's own code, and is shown with its traceback. A user's own model or data
    loader may raise a Mistake too.
    """
