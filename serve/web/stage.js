// The large picture: a start image, a video that is there, one that is being made, or a session.

import { address, ask, download, get, Refused } from "./api.js";
import { $, pause, seconds, tell } from "./dom.js";
import { Feed } from "./feed.js";

const UNFINISHED = ["queued", "in_progress"];
const isThere = ({ status, frames }) => status === "completed" && frames > 0;
export const unfinished = (each) => UNFINISHED.includes(each.status);

let going = new AbortController(); // what is shown now

/** Nothing but an image. */
export function showStill(source, title, facts = "") {
  leave();
  $("#video").hidden = true;
  $("#still").src = source;
  caption(title, facts);
}

/** Ends what is shown; a signal that what comes instead is to go by. */
export function leave() {
  going.abort();
  going = new AbortController();
  const video = $("#video");
  video.pause();
  video.removeAttribute("src");
  video.load();
  for (const name of ["#progress", "#files", "#hud", "#pad"]) $(name).hidden = true;
  $("#screen").classList.remove("live");
  return going.signal;
}

/** A video, from its beginning, whether it is whole or not. changed: called with it as it goes on. */
export async function showVideo(id, changed) {
  const signal = leave();
  let about = await get(`v1/videos/${id}`, { signal });
  const say = () => {
    describe(about);
    changed(about);
  };
  say();
  const video = $("#video");
  video.hidden = false;
  video.controls = true;
  let streamed = false;
  if (unfinished(about)) {
    stream(about, signal).then(() => (streamed = true), (error) => !signal.aborted && tell(`${error.message}`, true));
    while (unfinished(about)) {
      await pause(1000);
      if (signal.aborted) return;
      about = await get(`v1/videos/${id}`, { signal }).catch((error) => {
        if (error instanceof Refused && error.status === 404) throw error;
        return about;
      });
      say();
    }
  }
  if (signal.aborted || streamed || !isThere(about)) return;
  const at = video.currentTime;
  video.src = await address(`v1/videos/${id}/content`);
  video.currentTime = at;
  video.play().catch(() => {});
}

async function stream(about, signal) {
  const feed = new Feed($("#video"), about.frames > 1 ? Number(about.seconds) : Infinity);
  const response = await ask(`v1/videos/${about.id}/stream`, { signal });
  const reader = response.body.getReader();
  $("#video").play().catch(() => {});
  for (;;) {
    const { done, value } = await reader.read();
    if (signal.aborted) return;
    if (done) return feed.end();
    feed.push(value);
  }
}

const SAID = { queued: "It waits for its turn.", in_progress: "It is being made.", completed: "It is whole." };

function describe(about) {
  const facts = [seconds(about.seconds), about.size.replace("x", "×"), `seed ${about.seed}`];
  caption(about.prompt || "A take", [...facts, about.actions].filter(Boolean).join(" · "));
  $("#progress").hidden = !unfinished(about);
  $("#progress").value = about.progress;
  tell(SAID[about.status] ?? `It failed: ${about.error?.message}`, about.status === "failed");
  offer(about);
}

/** Its files, when they are there. */
export function offer(about) {
  $("#files").hidden = !isThere(about);
  download($("#save-video"), `v1/videos/${about.id}/content`, `${about.id}.mp4`);
  download($("#save-poses"), `v1/videos/${about.id}/content?variant=poses`, `${about.id}.npz`);
}

export function caption(title, facts) {
  $("#title").textContent = title;
  $("#facts").textContent = facts;
}
