// Requests to the server of this page. The key stays in this module's memory.

let key = "";

/** An error in words: the server's, or why it could not be asked. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null, param = null) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export function setKey(value) {
  if (!/^[\x20-\x7e]*$/.test(value)) throw new ApiError("a key has ASCII characters only; copy it again");
  key = value.trim();
}

export async function getJson(path) {
  return (await send(path)).json();
}

export async function getBytes(path) {
  return (await send(path)).arrayBuffer();
}

export async function postJson(path, body, signal) {
  return (await post(path, body, signal)).json();
}

/** Events of a streamed answer, up to its end. */
export async function* events(path, body, signal) {
  const response = await post(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (waiting + value.replaceAll("\r", "")).split("\n\n");
      waiting = parts.pop();
      for (const data of parts.map(dataOf)) {
        if (data === "[DONE]") return;
        if (data === "") continue;
        const event = JSON.parse(data);
        if (event.error) throw fromBody(event, response.status);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("the answer broke off; the connection was lost, or the server stopped");
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server does not answer; is it still running?");
  }
  if (response.ok) return response;
  throw fromBody(await response.json().catch(() => ({})), response.status);
}

function fromBody(body, status) {
  const error = body.error ?? { message: `the server answered with status ${status}` };
  return new ApiError(error.message, status, error.code, error.param);
}
