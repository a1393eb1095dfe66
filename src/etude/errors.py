"""The ways in which a command ends early. The scripts print `str(error)` as one line and exit with `code`."""


class EtudeError(Exception):
    """Something that a user can act on; `code` is the process's exit code."""

    code = 1


class Refusal(EtudeError):
    """Bad input or config. The message says what is wrong and what to type instead."""

    code = 2


class Interrupted(EtudeError):
    """Stopped by a signal with a checkpoint written: the run can be resumed."""

    code = 3


class StorageFault(EtudeError):
    """A disk that is full, read-only or gone. The message names the path."""

    code = 4


class NonFinite(EtudeError):
    """A loss or gradient that is not a finite number; no update was made with it."""

    code = 5


class JobFailed(EtudeError):
    """A job of a sweep did not complete; `code` is its exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message, code)  # both: it is pickled on its way from another process
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])
