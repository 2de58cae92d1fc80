"""The one error that a user's own mistake raises, and what is told of an error in one line."""

import errno
import os

# What the operating system refuses about a path that somebody gave.
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


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
    said = str(error)
    if any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT)):
        return (
            f"the disk is full ({said.splitlines()[0]}); make room and give the same command "
            "again: it goes on where it was"
        )
    if os.strerror(errno.EROFS) in said:
        return (
            f"the disk is read-only ({said.splitlines()[0]}); give a folder on another one with "
            "--workdir or --out"
        )
    if isinstance(error, OSError) and error.filename and error.errno in _NOT_OURS:
        return (
            f"{error.filename}: {error.strerror}; check the path's names and who may write there, "
            "or give another one"
        )
    return None
