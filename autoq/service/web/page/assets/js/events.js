// Server-sent events by fetch(): EventSource cannot send the Authorization header.

import { Problem, token } from "./api.js";

const FIRST_WAIT = 500; // milliseconds before a lost connection is tried again; doubled each time
const LONGEST_WAIT = 15_000;

/**
 * Give every event to `onEvent`, once and in order, until `isOver()` or the signal; a connection that
 * is lost is taken up again behind the last event.
 * @param {string} path of the stream
 * @param {object} options
 * @param {number} options.after id of the last event that is known already
 * @param {(event: object) => void} options.onEvent
 * @param {() => boolean} options.isOver whether a stream that ends has ended for good
 * @param {(connected: boolean) => void} options.onConnection
 * @param {AbortSignal} options.signal
 */
export async function follow(path, { after = 0, onEvent, isOver, onConnection = () => {}, signal }) {
  let last = after;
  let wait = FIRST_WAIT;
  while (!signal.aborted) {
    let isLost = false;
    try {
      for await (const event of connection(path, last, signal, onConnection)) {
        wait = FIRST_WAIT;
        if (event.id <= last) continue;
        last = event.id;
        onEvent(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
      isLost = true;
    }
    if (isLost) onConnection(false);
    await pause(wait, signal); // the last event may need a moment until it is known what it means
    if (isOver()) return;
    wait = Math.min(wait * 2, LONGEST_WAIT);
  }
}

async function* connection(path, last, signal, onConnection) {
  const headers = { Accept: "text/event-stream", "Last-Event-ID": String(last) };
  const known = token.get();
  if (known) headers.Authorization = `Bearer ${known}`;
  const response = await fetch(path, { headers, signal, cache: "no-store", credentials: "omit" });
  if (!response.ok) throw new Problem(response.status, await response.json().catch(() => ({})));
  onConnection(true);
  let buffered = "";
  for await (const text of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    buffered = (buffered + text).replaceAll("\r\n", "\n");
    const blocks = buffered.split("\n\n");
    buffered = blocks.pop();
    for (const block of blocks) {
      const event = parsed(block);
      if (event) yield event;
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The event that a block of lines says; null for a comment that only keeps the line open. */
export function parsed(block) {
  const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).replace(/^ /, ""));
  return data.length ? JSON.parse(data.join("\n")) : null;
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
