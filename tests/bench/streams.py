"""Many streamed answers at once, in a process of its own: `streams.py grpc|http HOST:PORT STREAMS TOKENS`.

Says `ready`, then waits for a line on stdin before each round and ends at an empty one; one JSON object a round.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import nullcontext

import aiohttp

from diptych import AsyncClient


def prompt(stream: int, round_number: int) -> str:
    """Short, and nobody's prefix."""
    return f"{round_number}.{stream} is the number of a story about a lighthouse, a goat and the sea. It begins:"


async def grpc_answer(client: AsyncClient, text: str, tokens: int) -> int:
    answer = client.generate(text, max_tokens=tokens, ignore_eos=True, temperature=0)
    return sum([len(response.chunk.token_ids) async for response in answer])


async def http_answer(session: aiohttp.ClientSession, url: str, model: str, text: str, tokens: int) -> int:
    body = {
        "model": model,
        "prompt": text,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last = b""
    async with session.post(url, json=body) as response:
        async for line in response.content:
            last = line if line.startswith(b"data: {") else last
    told = json.loads(last.removeprefix(b"data: "))
    if "usage" not in told:
        raise SystemExit(f"an answer ended in {told}")
    return told["usage"]["completion_tokens"]


async def main(protocol: str, target: str, streams: int, tokens: int) -> None:
    client = AsyncClient(target)
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    async with session.get(f"http://{target}/v1/models") if protocol == "http" else nullcontext() as models:
        model = (await models.json())["data"][0]["id"] if models else (await client.models())[0].id
    print("ready", flush=True)
    rounds = 0
    while (await asyncio.to_thread(sys.stdin.readline)).strip():
        rounds += 1
        texts = [prompt(stream, rounds) for stream in range(streams)]
        began = time.perf_counter()
        if protocol == "grpc":
            counts = await asyncio.gather(*(grpc_answer(client, text, tokens) for text in texts))
        else:
            url = f"http://{target}/v1/completions"
            counts = await asyncio.gather(*(http_answer(session, url, model, text, tokens) for text in texts))
        print(json.dumps({"tokens": sum(counts), "seconds": time.perf_counter() - began}), flush=True)
    await client.close()
    await session.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
