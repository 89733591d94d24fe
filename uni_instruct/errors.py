"""The errors that users see. Each message states the problem with its value, then the remedy, in one line."""

from uni_instruct.system.printable import printable

MAX_PROBLEM_LENGTH = 1000  # characters of a problem


class UniInstructError(Exception):
    """The base of all errors that users see.

    problem, remedy: the two halves of the message. param: the argument at fault, if there is one.
    exit_code: the exit status of the command line. http_status: the status of the server's response.
    """

    exit_code = 1
    http_status = 500

    def __init__(self, problem: str, *, remedy: str, param: str | None = None):
        # A path in the message may contain a newline, or bytes that are not valid text.
        problem, remedy = _cut(printable(problem)), printable(remedy)
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send their errors pickled. By default an exception is pickled as its message, which does not fit
        # these constructors.
        return _rebuilt, (type(self), self.problem, self.remedy, self.param)


def _cut(problem: str) -> str:
    """Cut the middle out of a long problem: a value in it may be a megabyte of a user's file."""
    return (
        problem
        if len(problem) <= MAX_PROBLEM_LENGTH
        else f"{problem[: MAX_PROBLEM_LENGTH // 2]} ... {problem[-MAX_PROBLEM_LENGTH // 2 :]}"
    )


def _rebuilt(kind: type[UniInstructError], problem: str, remedy: str, param: str | None) -> UniInstructError:
    error = kind.__new__(kind)
    UniInstructError.__init__(error, problem, remedy=remedy, param=param)
    return error


class RequestError(UniInstructError):
    """The request is wrong: an unknown name, a bad value, a missing file."""

    exit_code = 2
    http_status = 400


class FileFormatError(RequestError):
    """A file is corrupt, truncated, or of another format than expected."""


class BundleError(FileFormatError):
    """A bundle is incomplete, altered, invalid, or written by a newer version."""


class MissingExtraError(RequestError):
    """An optional dependency is not installed."""

    http_status = 500

    def __init__(self, package: str, *, extra: str):
        super().__init__(f"package '{package}' is not installed", remedy=f"pip install 'uni-instruct[{extra}]'")


class EngineRefusedError(UniInstructError):
    """An engine does not run on this machine, or its images differ from torch's."""


class CompilationError(UniInstructError):
    """An engine's code could not be compiled on this machine."""


class ParityError(UniInstructError):
    """An exported engine's images differ from torch's by more than the tolerance."""


class DiskError(UniInstructError):
    """A file cannot be written: the disk is full, or the folder is not writable."""

    exit_code = 2
