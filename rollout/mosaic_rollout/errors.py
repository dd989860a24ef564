"""The one exception that is shown to a user without a traceback."""


class UserError(Exception):
    """A user's mistake. The message names what is wrong and what would be right."""
