"""Code of the user's that a run calls: what it raises is its failure, with its name, whatever it is."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stitchvm_reward.errors import InputError

_running: list[str] = []  # outermost first


def running() -> str | None:
    """Return which code of the user's is running now: package.module:name, or None."""
    return _running[-1] if _running else None


@contextmanager
def users_code(name: str, failed: str) -> Iterator[None]:
    """Run the body, which calls the user's code `name`; what it raises becomes an InputError that begins with `failed`.

    That includes an exit and an interrupt: neither may end the run as if it had succeeded. Ctrl-C is still Ctrl-C.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    # Only the main thread may ask for signals, and only the default handler stands for Ctrl-C.
    main = threading.current_thread() is threading.main_thread()
    usual = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, press)
    _running.append(name)
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if pressed:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{failed} {reason}") from error
    finally:
        _running.pop()
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
