"""The one error type that a user's input can cause."""


class MansuError(ValueError):
    """Bad input: the message is one line that names the thing, its value and the way out.

    The command line prints it without a traceback and exits with status 2. Everything else that is raised is a bug.
    """


class NoEditError(MansuError):
    """A method ran with these settings and ended without an edit: its loss blew up, or no weight moved far enough."""
