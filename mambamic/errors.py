"""What can go wrong, as one small hierarchy.

Every message has three parts: the bad value, what was expected, what to do about it. An error
knows the HTTP status and the code under which a server reports it.
"""

from __future__ import annotations

from typing import ClassVar


class MambamicError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        problem: What is wrong, naming the bad value.
        expected: What would have been right.
        remedy: What to do now.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, problem: str, expected: str, remedy: str) -> None:
        super().__init__(f"{problem}; expected {expected}; {remedy}")
        self.problem = problem
        self.expected = expected
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[MambamicError], tuple[str, str, str]]:
        """Survive pickling between decoder processes (the default would pass one argument)."""
        return type(self), (self.problem, self.expected, self.remedy)

    def as_json(self) -> dict[str, dict[str, str]]:
        """Return the error object that a server answers with."""
        return {"error": {"code": self.code, "message": str(self)}}


class UsageError(MambamicError):
    """A command or a function was called with arguments that make no sense."""

    code = "usage"
    status = 400


class RequestError(MambamicError):
    """A request carries no image, or carries it in a form that is not read."""

    code = "bad_request"
    status = 400


class DecodeError(MambamicError):
    """Bytes are not an image, or are a damaged one."""

    code = "decode_failed"
    status = 400


class TooLargeError(MambamicError):
    """An image or a request is larger than the limits."""

    code = "too_large"
    status = 413


class MediaTypeError(MambamicError):
    """A body has a content type that is not read."""

    code = "unsupported_media_type"
    status = 415


class ShapeError(MambamicError):
    """A tensor has a shape that the model cannot take."""

    code = "bad_shape"
    status = 400


class CheckpointError(MambamicError):
    """A checkpoint or archive is missing, damaged, or of another version."""

    code = "bad_checkpoint"


class BackendError(MambamicError):
    """A kernel backend or device was asked for that this machine does not have."""

    code = "backend_unavailable"


class DataError(MambamicError):
    """A data set for training or evaluation cannot be used."""

    code = "bad_data"


class SlideError(MambamicError):
    """A slide, or a region of it, cannot be read."""

    code = "bad_slide"


class ServerError(MambamicError):
    """The server could not be started, reached, or stopped."""

    code = "server_failed"


class UnavailableError(MambamicError):
    """The server is stopping and takes no more requests."""

    code = "unavailable"
    status = 503


class OverloadedError(MambamicError):
    """The server has more work at hand than it can answer in time."""

    code = "overloaded"
    status = 503


class RateLimitedError(MambamicError):
    """One client sends more requests than the edge takes from it."""

    code = "rate_limited"
    status = 429


class UnauthorizedError(MambamicError):
    """The edge wants a token, or does not know this one."""

    code = "unauthorized"
    status = 401


class NotFoundError(MambamicError):
    """Nothing answers under this path: the model is not served there."""

    code = "not_found"
    status = 404


class WorkerLostError(MambamicError):
    """The process that had the request was killed, and so was the next one that got it."""

    code = "worker_lost"
    status = 502


class NoAnswerError(MambamicError):
    """There was no answer in the time allowed."""

    code = "timeout"
    status = 504


class AnswerError(MambamicError):
    """A server answered with what makes no sense, or with an error of no known name."""

    code = "bad_answer"
    status = 502


class InferenceError(MambamicError):
    """The model failed on an image that was read without fault."""

    code = "inference_failed"


class TrainingError(MambamicError):
    """A training run cannot go on; what it had reached is kept."""

    code = "training_failed"


def named(code: str, status: int, message: str) -> MambamicError:
    """Return the error that a server's answer stands for, with its message unchanged.

    Args:
        code: As the server states it.
        status: Of the answer, for one whose code is of no use.
        message: Of three parts, or of any form.
    """
    known = {kind.code: kind for kind in MambamicError.__subclasses__()}
    by_status = {401: UnauthorizedError, 404: NotFoundError, 507: WorkerLostError}
    kind = known.get(code) or by_status.get(status, AnswerError)
    problem, _, rest = message.partition("; expected ")
    expected, _, remedy = rest.partition("; ")
    if remedy:
        return kind(problem, expected, remedy)
    if kind is NotFoundError:
        return kind(
            f"{message.rstrip('.')} (status {status})",
            "the name, or NAME/VERSION, of a model that is served there",
            "check the model's name; the server's management API lists them under /models",
        )
    return kind(
        f"{message.rstrip('.')} (status {status})", "a prediction", "see the log of the server"
    )
