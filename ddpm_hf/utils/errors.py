"""The error classes of users' mistakes."""


class UserError(ValueError):
    """A mistake of a user, in one sentence: what is wrong, which value, what to write instead.

    Commands print the sentence and end with exit code 2. Any other exception is a fault of this package or of a
    library, and keeps its traceback. It is a `ValueError`, so that code which catches those of stock diffusers works.
    """


class NotFiniteError(UserError):
    """An image, a number or a weight is NaN or infinite, where it would have become part of a result."""


def in_one_line(error: BaseException) -> str:
    """Return an error's message in one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, where further ones are for developers; its class if it has none."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
