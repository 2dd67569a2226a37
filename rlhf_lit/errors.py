"""The one exception that means "the user can mend this": the command line prints it and exits with status 2."""


class UserError(ValueError):
    """Bad input, in one line: the file, row or key, what is wrong with it, and what to do."""


def say(line: str) -> None:
    import sys

    print(line, file=sys.stderr)
