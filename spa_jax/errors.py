"""The one error that a user's own mistake raises, and what is told of an error in one line."""

import errno
import os


class UserError(ValueError):
    """A mistake in what the user gave us.

    The message names the file, line or flag and says what to do; the binaries
    print it without a traceback and exit with status 2.
    """


def complaint(error: Exception) -> str | None:
    """What to tell of an error that is not ours; None if it is, and wants a traceback."""
    if isinstance(error, UserError):
        return str(error)
    # Python, Orbax and safetensors raise three kinds of errors for it, with this text in.
    if os.strerror(errno.ENOSPC) in str(error):
        return (
            f"the disk is full ({str(error).splitlines()[0]}); make room and give the same command "
            "again: it goes on where it was"
        )
    return None
