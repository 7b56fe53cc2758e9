"""The official Python client: models, chat, stream, completions. Prints a line for each."""

import sys

from openai import OpenAI

http, model, question = sys.argv[1:]
client = OpenAI(base_url=f"http://{http}/v1", api_key="none")
messages = [{"role": "user", "content": question}]
print("models:", [each.id for each in client.models.list()])
answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
print("chat:", answer.choices[0].message.content, answer.usage)
chunks = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
completion = client.completions.create(model=model, prompt="Paris is the capital of", max_tokens=8, temperature=0)
print("completion:", completion.choices[0].text)
