"""`diptych scale`: how many workers a pool has. Knows the client, not how it is done."""

from __future__ import annotations

import click

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from diptych.client import Client


@click.command(short_help="Start or drain workers of a pool.", epilog=EXIT_CODES)
@click.argument("pool", type=click.Choice(("prefill", "decode", "mixed")))
@click.argument("workers", type=click.IntRange(min=0))
@takes_grpc
def scale(pool: str, workers: int, target: str) -> None:
    """Start or drain workers of POOL until it has so many. No request is lost.

    The last ones are drained first. Returns when all are up or have ended.

    \b
    Example:
      diptych scale decode 3
    """
    with exit_codes(), Client(target) as client:
        done = client.scale(pool, workers)
    told = [f"started {', '.join(done.started)}"] if done.started else []
    told += [f"ended {', '.join(done.ended)}"] if done.ended else []
    click.echo(f"{pool} has {workers}: {'; '.join(told) or 'nothing to do'}, {done.seconds:.1f} s")
