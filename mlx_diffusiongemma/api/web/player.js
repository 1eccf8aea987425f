// The position in a recording: it follows the stream while the answer is made, and replays it afterwards.
// Positions count frames from 0; the one behind the last frame is the finished answer.

const REDRAW = 16; // ms: frames that come faster are skipped on the screen, never in the recording
const REPLAY = 140; // ms per step of a replay
const LAST_STEP = 350; // ms: a canvas that is done rests for a moment

export class Player {
  /**
   * @param {Recording} recording
   * @param {number} pace Milliseconds for which every step is shown at least while the answer is made; 0 for no wait.
   * @param {function(Player): void} draw Called after every change.
   */
  constructor(recording, pace, draw) {
    this.position = -1; // nothing has come yet
    this.isLive = true; // follows the stream
    this.isPlaying = false; // replays
    this.#recording = recording;
    this.#pace = pace;
    this.#draw = draw;
  }

  #recording;
  #pace;
  #draw;
  #complete = false; // no more frames will come
  #timer = null;
  #shownAt = -Infinity;
  #caughtUp = null;

  /** The last position: the finished answer, or while it is made the newest frame. */
  get end() {
    return this.#recording.frames.length - (this.#complete ? 0 : 1);
  }

  get isAtEnd() {
    return this.#complete && this.position >= this.end;
  }

  /** Note that a frame came. */
  arrived() {
    if (this.isLive) this.#schedule();
  }

  /** Note that nothing more comes. Resolve when the screen has caught up. */
  complete() {
    this.#complete = true;
    return new Promise((resolve) => {
      this.#caughtUp = resolve;
      this.#schedule();
    });
  }

  /** Go to a position. */
  seek(position) {
    this.#cancel();
    this.isPlaying = false;
    this.#show(Math.min(Math.max(position, 0), this.end));
  }

  /** Replay, from the beginning when at the end; or pause. */
  toggle() {
    this.isPlaying = !this.isPlaying;
    if (this.isPlaying && this.isAtEnd) this.position = -1;
    if (this.isPlaying) this.#next();
    else this.seek(this.position);
  }

  #schedule() {
    const wait = this.isPlaying ? this.#replayWait() : Math.max(this.#pace, REDRAW);
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.#next();
    }, Math.max(0, this.#shownAt + wait - performance.now()));
  }

  #replayWait() {
    const { frames } = this.#recording;
    const endsCanvas = frames[this.position]?.block !== frames[this.position + 1]?.block;
    return endsCanvas ? LAST_STEP : REPLAY;
  }

  #next() {
    const skips = this.isLive && this.#pace === 0;
    this.#show(skips ? this.end : Math.min(this.position + 1, this.end));
    if (this.position < this.end) this.#schedule();
  }

  #show(position) {
    this.position = position;
    this.#shownAt = performance.now();
    if (this.isAtEnd) {
      this.isLive = this.isPlaying = false;
      this.#caughtUp?.();
    }
    this.#draw(this);
  }

  #cancel() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }
}
