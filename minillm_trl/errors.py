"""What whoever starts a run can put right, told apart from faults of the program."""


class UserError(ValueError):
    """A mistake in arguments, data or files. The message says what, where, the value, and how to put it right.

    The command line prints the message alone and ends with status 2. Every other exception keeps its traceback.
    """


class FileError(UserError, OSError):
    """A file or folder that cannot be read or written as it is."""


class MissingPackageError(UserError, ImportError):
    """An optional package that an argument needs, and how to install it."""
