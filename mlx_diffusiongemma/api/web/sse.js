// Server-sent events from a fetch: `EventSource` can neither POST nor send a key.

/**
 * Yield the data of every event of a response body; comments and other fields are skipped.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* eventData(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line === "") {
      if (data.length) yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
    }
  }
}

/** Yield the lines of a stream as they become complete. What a broken stream leaves of a line is dropped. */
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split(/\r\n|\n/);
      rest = pieces.pop();
      yield* pieces;
    }
  } finally {
    await reader.cancel().catch(() => {}); // left early: the server may stop
  }
}
