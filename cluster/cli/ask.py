"""`diptych ask`: one streamed chat answer over gRPC. Knows the client and the terminal, nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from diptych.client import Client
from diptych.v1.inference_pb2 import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.v1.inference_pb2 import GenerateComplete, GenerateResponse


@click.command(short_help="One streamed answer over gRPC.", epilog=EXIT_CODES)
@click.argument("prompt")
@takes_grpc
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer; what is left of the context if unset.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Equal seeds give equal answers.")
@click.option("--usage", is_flag=True, help="Say on stderr what the answer took and who gave it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text as it comes.")
def ask(
    prompt: str,
    target: str,
    system: str | None,
    max_tokens: int | None,
    temperature: float,
    seed: int | None,
    usage: bool,
    as_json: bool,
) -> None:
    """Ask the model PROMPT and print its answer as it comes.

    \b
    Example:
      diptych ask "What is the capital of France?"
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    with exit_codes(), Client(target) as client:
        responses = client.generate(messages=messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        text, complete = _read(responses, echo=not as_json)
    if as_json:
        click.echo(json.dumps({"text": text, **_as_dict(complete)}, ensure_ascii=False))
    if usage:
        click.echo(_usage_line(complete), err=True)


def _read(responses: Iterator[GenerateResponse], *, echo: bool) -> tuple[str, GenerateComplete]:
    """The whole text and the last message; each piece is written the moment it is here."""
    pieces: list[str] = []
    for response in responses:
        if response.HasField("complete"):
            if echo:
                click.echo()
            return "".join(pieces), response.complete
        pieces.append(response.chunk.text)
        if echo:
            click.echo(response.chunk.text, nl=False)
    raise AssertionError("a stream ends with `complete` or an error")


def _as_dict(complete: GenerateComplete) -> dict[str, object]:
    """As the HTTP front says it: plain numbers and `stop`, not protobuf's JSON."""
    usage, served = complete.usage, complete.diptych
    return {
        "finish_reason": FinishReason.Name(complete.finish_reason).removeprefix("FINISH_REASON_").lower(),
        "request_id": complete.request_id,
        "usage": {field.name: getattr(usage, field.name) for field in usage.DESCRIPTOR.fields},
        "diptych": {field.name: getattr(served, field.name) for field in served.DESCRIPTOR.fields},
    }


def _usage_line(complete: GenerateComplete) -> str:
    usage, served = complete.usage, complete.diptych
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} generated; "
        f"{served.how}, prefill {served.prefill_worker}, decode {served.decode_worker}, "
        f"{served.kv_blocks_sent} KV blocks ({served.kv_bytes_sent} bytes) sent; {complete.request_id}"
    )
