// Fragmented MP4 into a <video>, as it comes: a video that is still being made, or a session.

const KEPT = 30; // seconds before what is seen, of a video without end

export class Feed {
  #video;
  #source;
  #buffer = null;
  #waiting = [];
  #whole = false;
  #seconds;

  /** seconds: how long it will be, if that is known. An error where the browser cannot do this. */
  constructor(video, seconds = Infinity) {
    const Source = self.ManagedMediaSource ?? self.MediaSource;
    if (!Source) throw new Error("this browser shows a video only when it is whole");
    this.#video = video;
    this.#seconds = seconds;
    this.#source = new Source();
    this.#source.addEventListener("sourceopen", () => this.#go(), { once: true });
    video.disableRemotePlayback = true;
    video.src = URL.createObjectURL(this.#source);
  }

  push(bytes) {
    this.#waiting.push(bytes);
    this.#go();
  }

  end() {
    this.#whole = true;
    this.#go();
  }

  /** Seconds that are there and were not seen yet. */
  get ahead() {
    const there = this.#video.buffered;
    return there.length ? there.end(there.length - 1) - this.#video.currentTime : 0;
  }

  #go() {
    if (this.#source.readyState !== "open" || this.#buffer?.updating) return;
    if (this.#buffer === null && !this.#begun()) return;
    if (this.#waiting.length) {
      const next = this.#waiting[0];
      try {
        this.#buffer.appendBuffer(next);
        this.#waiting.shift();
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        if (!this.#forget(1)) setTimeout(() => this.#go(), 1000); // once more of it was seen
      }
    } else if (this.#whole) {
      this.#source.endOfStream();
    } else if (this.#seconds === Infinity) {
      this.#forget(KEPT);
    }
  }

  /** Whether enough of the beginning is there to say what kind of video this is. */
  #begun() {
    const size = this.#waiting.reduce((sum, part) => sum + part.length, 0);
    const head = new Uint8Array(size);
    let at = 0;
    for (const part of this.#waiting) {
      head.set(part, at);
      at += part.length;
    }
    this.#waiting = [head];
    const codec = codecOf(head);
    if (codec === null) return false;
    this.#buffer = this.#source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
    this.#buffer.addEventListener("updateend", () => this.#go());
    if (this.#seconds !== Infinity) this.#source.duration = this.#seconds;
    return true;
  }

  /** Whether something is being removed that was seen, and is further back than `kept` seconds. */
  #forget(kept) {
    const there = this.#buffer.buffered;
    const until = this.#video.currentTime - kept;
    if (!there.length || there.start(0) + kept > until) return false;
    this.#buffer.remove(0, until);
    return true;
  }
}

/** Of H.264, as the box avcC says: version, then profile, compatibility and level. */
function codecOf(head) {
  for (let at = 0; at + 8 <= head.length; at++) {
    if (head[at] === 0x61 && head[at + 1] === 0x76 && head[at + 2] === 0x63 && head[at + 3] === 0x43) {
      const parts = [...head.subarray(at + 5, at + 8)];
      return `avc1.${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
    }
  }
  return null;
}
