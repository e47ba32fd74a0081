"""The one exception that means: the input or the environment is wrong, not the program."""


class UserError(Exception):
    """Bad input. The message is one sentence that says what is wrong and where.

    The command line prints it and exits with code 2; library callers may catch it.
    """
