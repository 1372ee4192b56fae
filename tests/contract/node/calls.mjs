// Every call with the official Node SDK; prints what came back as JSON, without what names the answer.
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "say 12 tokens" }];
const chat = { model: "openai/gpt-4o", messages };
const varying = new Set(["id", "created", "created_at", "completed_at", "item_id", "request_id", "_request_id", "system_fingerprint"]);

function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (value && typeof value === "object") {
    // Chunks say `usage: null` where usage was asked for, which Sentinel always does; to the SDK it is the same as nothing.
    const kept = Object.entries(value).filter(([key, v]) => !varying.has(key) && !(key === "usage" && v === null));
    return Object.fromEntries(kept.map(([key, v]) => [key, plain(v)]));
  }
  return value;
}

async function all(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

async function refused(call) {
  try {
    await call();
    return "not refused";
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
}

const calls = {
  chat: () => client.chat.completions.create(chat),
  stream: () => all(client.chat.completions.create({ ...chat, stream: true })),
  streamWithUsage: () => all(client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } })),
  streamHelper: async () => (await client.chat.completions.stream(chat).finalChatCompletion()).choices,
  completions: () => client.completions.create({ model: "openai/gpt-3.5-turbo-instruct", prompt: "say 9 tokens" }),
  embeddings: () => client.embeddings.create({ model: "openai/text-embedding-3-small", input: ["one", "two"] }),
  responses: () => client.responses.create({ model: "openai/gpt-4o", input: "say 8 tokens" }),
  responsesStream: () => all(client.responses.create({ model: "openai/gpt-4o", input: "say 8 tokens", stream: true })),
  models: () => all(client.models.list()),
  model: () => client.models.retrieve("openai/gpt-4o"),
  file: async () => (await client.files.create({ file: await toFile(Buffer.from("hello"), "a.txt"), purpose: "assistants" })).bytes,
  speech: async () => (await (await client.audio.speech.create({ model: "tts-1", voice: "alloy", input: "hello" })).arrayBuffer()).byteLength,
  badRequest: () => refused(() => client.chat.completions.create({ model: "sim/status-400", messages })),
  serverError: () => refused(() => client.chat.completions.create({ model: "sim/status-500", messages })),
};

const told = {};
for (const [name, call] of Object.entries(calls)) told[name] = plain(await call());
console.log(JSON.stringify(told));
