// The server's API, as docs/serve.md has it. What goes wrong is an error whose message is a sentence for people.

export class ApiError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

const UNREACHABLE = "expected an answer of the server, found no connection; is it running?";

function errorOf(status, text) {
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(message, code);
  } catch {
    return new ApiError(`expected an answer of the server, found status ${status}`, "unknown");
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(UNREACHABLE, "unreachable");
  }
  if (!response.ok) throw errorOf(response.status, await response.text());
  return response;
}

const json = async (path, options) => (await request(path, options)).json();
export const pathOf = (id) => `/v1/volumes/${encodeURIComponent(id)}`;

export const modelName = async () => (await json("/v1/models")).data[0].id;
export const volumes = () => json("/v1/volumes?limit=10000");
export const facts = (id) => json(pathOf(id));
export const remove = (id) => json(pathOf(id), { method: "DELETE" });
export const kept = (path) => json(path);

// The bytes of a NIfTI file: the model's grid, or with `fine` the prepared volume.
export const nifti = async (id, fine, signal) =>
  (await request(`${pathOf(id)}/grid?format=nifti&of=${fine ? "volume" : "model"}`, { signal })).arrayBuffer();

// Send files; `onProgress` gets the share that was sent. fetch() does not tell it.
export function upload(files, series, onProgress, signal) {
  const form = new FormData();
  for (const file of files) form.append("file", file, file.name);
  if (series) form.append("series", series);
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", "/v1/volumes");
    sending.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    sending.onload = () =>
      sending.status === 201 ? resolve(JSON.parse(sending.responseText)) : reject(errorOf(sending.status, sending.responseText));
    sending.onerror = () => reject(new ApiError(UNREACHABLE, "unreachable"));
    sending.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

export function bodyOf(model, volume, question) {
  const content = [{ type: "volume", volume }, { type: "text", text: question }];
  return { model, messages: [{ role: "user", content }] };
}

// Yield the chunks of an answer while it is made.
export async function* ask(body, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const headers = { "content-type": "application/json" };
  const response = await request("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(streamed), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("expected the end of the answer, found a line that broke; ask again", "broken");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code);
      yield chunk;
    }
  }
}
