"""What the commands that call a running cluster share: its address, and exit codes. Knows no command."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click
import grpc

from diptych.client import DEFAULT_TARGET, Unreachable
from diptych.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Generator

FAILED: Final = 1
UNAVAILABLE: Final = 69
"""EX_UNAVAILABLE of sysexits.h."""
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""

EXIT_CODES: Final = "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 69 nothing answers there, 130 interrupted."

takes_grpc = click.option(
    "--grpc", "target", metavar="HOST:PORT", default=DEFAULT_TARGET, show_default=True, help="The front's gRPC address."
)


@contextmanager
def exit_codes() -> Generator[None]:
    """Ends the process with one line on stderr, and the code that says what happened."""
    try:
        yield
    except Unreachable as error:
        _end(str(error), UNAVAILABLE)
    except ServingError as error:
        _end(str(error), FAILED)
    except grpc.RpcError as error:
        # Something answers there that isn't a front of ours, or of another version.
        _end(str(error), FAILED)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)


def _end(message: str, code: int) -> None:
    click.echo(f"diptych: {message}", err=True)
    sys.exit(code)
