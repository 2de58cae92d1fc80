"""The one error that a user's own mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave us.

    The message names the file, line or flag and says what to do; the binaries
    print it without a traceback and exit with status 2.
    """
