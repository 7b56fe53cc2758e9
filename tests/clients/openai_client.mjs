// The official Node client: chat, whole and streamed. Prints a line for each.
import OpenAI from "openai";
import { readFileSync } from "node:fs";

const [http, model, question] = process.argv.slice(2);
const manifest = new URL("./node_modules/openai/package.json", import.meta.url);
console.log("openai", JSON.parse(readFileSync(manifest)).version);
const client = new OpenAI({ baseURL: `http://${http}/v1`, apiKey: "none" });
const messages = [{ role: "user", content: question }];
const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
console.log("chat:", answer.choices[0].message.content, JSON.stringify(answer.usage));
let text = "";
const options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: options })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
console.log("stream:", text);
