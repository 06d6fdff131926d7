"""Exceptions of the package."""


class UnsupportedError(NotImplementedError):
    """The call is right, but the named implementation (or none at all) cannot run it.

    The message lists every reason and what would work. A call that is wrong everywhere raises `ValueError` instead.
    """
