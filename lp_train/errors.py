"""The one exception type for mistakes of the user."""


class UserError(ValueError):
    """A user's mistake, told in one line: the value, the rule it breaks, and the remedy.

    Commands print it without a traceback (``--debug`` shows one) and exit with code 2. Everything else that
    is raised is a bug of ours and keeps its traceback.
    """
