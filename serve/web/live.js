// A session over a WebSocket, steered while it is made: serve/live.py has what is said.

import { key, url } from "./api.js";
import { pause } from "./dom.js";
import { Feed } from "./feed.js";
import { letters } from "./path.js";

const TRIES = 5;

export class Session {
  #begin;
  #socket;
  #feed;
  #timer;
  #fragments = 0;
  #last = 0; // frame that is there
  #said = 0; // chunks whose keys were taken
  #resting = true;
  #sent = new Map(); // when, by sequence
  #closed = false;

  /** begin: the fields of a start; told: called with each message of the server, and with {type: "lost"} when the
   * connection is. */
  constructor(begin, video, model, pad, told) {
    Object.assign(this, { video, model, pad, told });
    this.#begin = { ...begin, type: "start" };
    this.#feed = new Feed(video);
    this.#timer = setInterval(() => this.#steer(), 50);
    this.#connect(0);
  }

  end() {
    this.#say({ type: "end" });
  }

  /** Leave it at once. */
  close() {
    this.#closed = true;
    clearInterval(this.#timer);
    this.#say({ type: "end" });
    this.#socket.close();
  }

  #connect(tried) {
    const socket = new WebSocket(url("v1/sessions").replace(/^http/, "ws"));
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.#say({ ...this.#begin, ...(key() !== null && { key: key() }) });
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") {
        tried = 0;
        this.#hear(JSON.parse(data));
      } else {
        this.#fragments++;
        this.#feed.push(new Uint8Array(data));
        this.video.play().catch(() => {});
        this.#steer();
      }
    };
    socket.onclose = async () => {
      if (this.#closed) return;
      if (this.id === undefined || tried === TRIES) return this.#finish("the connection was lost");
      this.told({ type: "lost" });
      await pause(500 * 2 ** tried);
      this.#begin = { type: "resume", session: this.id, fragments: this.#fragments };
      this.#connect(tried + 1);
    };
  }

  #hear(said) {
    if (said.type === "started") this.id = said.session;
    if (said.type === "dropped") this.#said--;
    if (said.type === "frames") {
      this.#last = said.first + said.frames - 1;
      said.took = said.frames > 1 ? (performance.now() - this.#sent.get(said.sequence)) / 1000 : undefined;
    }
    if (said.type === "error") this.#finish(said.error.message);
    else if (said.type === "closed") this.#finish(said.reason);
    else this.told(said);
  }

  #finish(reason) {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#timer);
    this.#feed.end();
    this.told({ type: "closed", reason });
  }

  /** Says what the next chunk is to do: not before it is needed, so that what is pressed now shows soon; and not while
   * nobody presses anything, but for one chunk in which the camera comes to rest. */
  #steer() {
    const { chunk, fps } = this.model;
    const made = Math.floor(this.#last / chunk);
    const wait = this.#feed.ahead * fps + (this.#said - made) * chunk;
    if (this.#socket?.readyState !== WebSocket.OPEN || this.id === undefined || document.hidden) return;
    if (this.#said - made > 1 || wait > 1.6 * chunk) return;
    const moves = this.pad.take();
    if (!moves.size && this.#resting) return;
    this.#resting = !moves.size;
    const sequence = this.#sent.size;
    this.#sent.set(sequence, performance.now());
    this.#said++;
    this.#say({ type: "actions", actions: `${letters(moves, this.model.steering)}-${chunk}`, sequence });
  }

  #say(what) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(what));
  }
}
