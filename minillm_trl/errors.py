"""Errors that the person who starts a run can fix, as opposed to faults of the program."""


class UserError(ValueError):
    """A mistake in arguments, data or files. The message names the mistake, its place, the value and the fix.

    The command line prints only the message and exits with status 2. All other exceptions keep their traceback.
    """


class FileError(UserError, OSError):
    """A file or folder that cannot be read or written."""


class MissingPackageError(UserError, ImportError):
    """An optional package that an argument needs. The message says how to install it."""
