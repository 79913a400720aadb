// Requests to the server: JSON, server-sent events, and the API key if it needs one.

import { t } from "./i18n.js";

const KEY = "lit_gpt.key";

async function send(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("unreachable"));
  }
  if (response.status === 401) {
    await askForKey(key);
    return send(path, body, signal);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

// The error that the server answered with; its `code` is a name that programs can test for.
async function refusal(response) {
  try {
    const { message, code } = (await response.json()).error;
    return Object.assign(new Error(message), { code });
  } catch {
    return new Error(`${response.status} ${response.statusText}`);
  }
}

let asking = null; // several requests may be refused at once; one dialog is enough

function askForKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return Promise.resolve(); // another call has got one meanwhile
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("ask-key");
    const field = document.getElementById("key");
    field.value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      if (!field.value.trim()) return reject(new Error(t("keyTitle"))); // closed with Escape
      sessionStorage.setItem(KEY, field.value.trim());
      resolve();
    }, { once: true });
  });
  return asking;
}

export async function getJson(path) {
  return (await send(path)).json();
}

export async function postJson(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// The JSON chunks of a streamed answer, one by one.
export async function* postStream(path, body, signal) {
  const response = await send(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (kept + value).split("\n\n");
    kept = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
