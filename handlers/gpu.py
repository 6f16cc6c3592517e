"""What a worker does where the GPU fails it.

After some errors, an illegal memory access for one, every further call of this process to CUDA
fails; another process is not harmed. So the worker answers what it has in hand, with an error for
each image, and ends: TorchServe starts another one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

logger = logging.getLogger(__name__)

# For the answers to leave by; what comes in meanwhile fails at once.
LEAVE_AFTER_S = 0.5


def release_memory() -> None:
    """Give back the memory that torch holds and does not use."""
    import torch

    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        logger.exception("no memory could be released")


def is_broken() -> bool:
    """Tell whether this process has used CUDA and can use it no more."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        logger.exception("the GPU takes no more calls of this process")
        return True
    return False


def leave() -> None:
    """End this process in a moment."""
    logger.error("this worker ends, for another one to begin anew")
    # As if it were killed from outside: its requests may then be sent again, those of a worker that
    # ends by itself may not.
    timer = threading.Timer(LEAVE_AFTER_S, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
