"""The errors that users meet. Each message gives the problem with its value, then the remedy, in one line."""

from uni_instruct.printable import printable

LONGEST = 1000  # characters of a problem


class UniInstructError(Exception):
    """Something failed while running. `param` names the argument at fault, where there is one.

    `exit_code` is what the command line returns, `http_status` what the server answers.
    """

    exit_code = 1
    http_status = 500

    def __init__(self, problem: str, *, remedy: str, param: str | None = None):
        # A path may hold a newline, and bytes that are no text.
        problem, remedy = _cut(printable(problem)), printable(remedy)
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled as their message alone, which no constructor here takes. Workers send theirs.
        return _rebuilt, (type(self), self.problem, self.remedy, self.param)


def _cut(problem: str) -> str:
    """Without its middle where it is longer than anybody reads: a value in it may be a megabyte of somebody's file."""
    return problem if len(problem) <= LONGEST else f"{problem[: LONGEST // 2]} ... {problem[-LONGEST // 2 :]}"


def _rebuilt(kind: type[UniInstructError], problem: str, remedy: str, param: str | None) -> UniInstructError:
    error = kind.__new__(kind)
    UniInstructError.__init__(error, problem, remedy=remedy, param=param)
    return error


class RequestError(UniInstructError):
    """The request was wrong: an unknown name, a bad value, a missing file."""

    exit_code = 2
    http_status = 400


class FileFormatError(RequestError):
    """A file is corrupt, truncated, or not what it was taken for."""


class BundleError(FileFormatError):
    """A bundle is incomplete, altered, or written by a newer version."""


class MissingExtraError(RequestError):
    """An optional dependency is not installed."""

    http_status = 500

    def __init__(self, package: str, *, extra: str):
        super().__init__(f"package '{package}' is not installed", remedy=f"pip install 'uni-instruct[{extra}]'")


class EngineRefusedError(UniInstructError):
    """An engine does not run on this machine, or answers otherwise than torch."""


class CompilationError(UniInstructError):
    """An engine's code could not be compiled on this machine."""


class ParityError(UniInstructError):
    """An exported engine does not agree with torch."""


class DiskError(UniInstructError):
    """Writing failed: the disk is full or the folder is not writable."""

    exit_code = 2
