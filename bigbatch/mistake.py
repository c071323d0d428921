"""The one way to tell users of a mistake of theirs."""


class Mistake(ValueError):
    """Something in what was asked cannot be right; the text is one line that says what to change.

    The programs print the text alone and end with status 2. Any other error is a bug, of this
    package or of the user's own code, and is shown with its traceback. A model or a loader of the
    user's own may raise it too.
    """
