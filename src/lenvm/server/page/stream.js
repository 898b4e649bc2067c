// The server's streams: a request in, tokens out.
"use strict";

const lenvmStream = (() => {
  class ServerError extends Error {
    constructor(message, status) {
      super(message);
      this.status = status;
    }
  }

  function headers(key) {
    return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  }

  async function refusal(reply) {
    let message = `the server answered ${reply.status}`;
    try {
      message = (await reply.json()).error.message || message;
    } catch {
      /* not our form: the status has to do */
    }
    return new ServerError(message, reply.status);
  }

  /** GET of a path as JSON. */
  async function get(path, key) {
    const reply = await fetch(path, { headers: headers(key) });
    if (!reply.ok) throw await refusal(reply);
    return reply.json();
  }

  /** Chunks of a streamed chat completion, as they come. */
  async function* chat(body, key, signal) {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(key),
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
    if (!reply.ok) throw await refusal(reply);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("the stream broke off before its end", 0);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message, 0);
        yield chunk;
      }
    }
  }

  return { get, chat, ServerError };
})();
