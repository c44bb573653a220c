// Of many requests in a row only the latest matters.

const LEAST_MILLISECONDS = 34; // between requests: about thirty a second while a slider is dragged

/** Asks for what was wanted last; what was asked before is aborted, and not too often. */
export class Latest {
  /**
   * @param {(body: object, signal: AbortSignal) => Promise} ask
   * @param {(reply: object, body: object) => void} onReply
   * @param {(problem: Error) => void} onProblem
   */
  constructor(ask, onReply, onProblem, signal) {
    Object.assign(this, { ask, onReply, onProblem, signal });
    this.lastSent = -Infinity;
    this.timer = null;
    this.current = null;
  }

  /** Ask soon; an older wish that was not sent yet is forgotten. */
  want(body) {
    clearTimeout(this.timer);
    const wait = this.lastSent + LEAST_MILLISECONDS - performance.now();
    if (wait > 0) this.timer = setTimeout(() => this.send(body), wait);
    else this.send(body);
  }

  async send(body) {
    this.current?.abort();
    const mine = (this.current = new AbortController());
    this.lastSent = performance.now();
    try {
      const reply = await this.ask(body, AbortSignal.any([mine.signal, this.signal]));
      if (this.current === mine) this.onReply(reply, body);
    } catch (error) {
      if (this.current === mine && !this.signal.aborted && error.name !== "AbortError") this.onProblem(error);
    }
  }
}
