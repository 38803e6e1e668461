"""The one error that a user can mend."""


class InputError(ValueError):
    """Bad input from outside: a config, data, checkpoint, mesh or grader setting.

    The message names the file, line or key and how to mend it. The command line prints it
    without a traceback and exits with code 2.
    """
