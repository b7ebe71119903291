// The list of what was made.

import { address, ask, download, get } from "./api.js";
import { $, element, seconds, tell } from "./dom.js";
import { unfinished } from "./stage.js";

const PAGE = 12;
const cards = new Map(); // by id
let pages = 1;
let shown = null;
let timer;

/** Brings it up to date, and keeps it so while something is being made. */
export async function refresh() {
  clearTimeout(timer);
  let found = [];
  let more = true;
  try {
    for (let page = 0; page < pages && more; page++) {
      const after = page ? `&after=${found.at(-1).id}` : "";
      const list = await get(`v1/videos?limit=${PAGE}${after}`);
      found = [...found, ...list.data];
      more = list.has_more;
    }
    place(found);
    $("#older").hidden = !more;
  } finally {
    if (found.some(unfinished)) timer = setTimeout(() => refresh().catch(() => {}), document.hidden ? 10000 : 2000);
  }
}

export function older() {
  pages++;
  return refresh();
}

/** Which of them the large picture shows. */
export function mark(id) {
  shown = id;
  for (const [each, card] of cards) card.item.classList.toggle("shown", each === id);
}

function place(videos) {
  const ids = new Set(videos.map((video) => video.id));
  for (const [id, card] of cards) {
    if (!ids.has(id)) {
      card.item.remove();
      cards.delete(id);
    }
  }
  const list = $("#videos ul");
  videos.forEach((video, number) => {
    const card = cards.get(video.id) ?? made(video);
    cards.set(video.id, card);
    card.update(video);
    if (list.children[number] !== card.item) list.insertBefore(card.item, list.children[number] ?? null);
  });
  $("#none").hidden = videos.length > 0;
  mark(shown);
}

function made(video) {
  const title = element("h3", { textContent: video.prompt || "A take" });
  const facts = element("p", { className: "hint" });
  const bar = element("progress", { max: 100, "aria-label": "How much of it is made" });
  const shot = element("button", { type: "button", className: "shot", "aria-label": `Show: ${title.textContent}` });
  const save = element("a", { textContent: "Video" });
  const poses = element("a", { textContent: "Poses" });
  const remove = element("button", { type: "button", textContent: "Delete" });
  const item = element("li", { className: "card" }, shot, element("div", {}, title, facts, bar));
  item.append(element("div", { className: "row" }, save, poses, remove));
  shot.onclick = () => (location.hash = video.id);
  download(save, `v1/videos/${video.id}/content`, `${video.id}.mp4`);
  download(poses, `v1/videos/${video.id}/content?variant=poses`, `${video.id}.npz`);
  twice(remove, async () => {
    await ask(`v1/videos/${video.id}`, { method: "DELETE" });
    item.remove();
    tell("It is deleted.");
    if (location.hash === `#${video.id}`) location.hash = "";
    await refresh();
  });
  let status = null;
  return {
    item,
    update(now) {
      facts.textContent = [seconds(now.seconds), now.actions].filter(Boolean).join(" · ");
      bar.value = now.progress;
      if (now.status === status) return;
      status = now.status;
      bar.hidden = !unfinished(now);
      save.hidden = poses.hidden = status !== "completed" || now.frames === 0;
      fill(shot, now);
    },
  };
}

/** Asks once more before it does so. */
function twice(button, act) {
  const { textContent } = button;
  const back = () => (button.textContent = textContent);
  button.onblur = back;
  button.onclick = () => {
    if (button.textContent !== textContent) return act().catch((error) => tell(error.message, true));
    button.textContent = "Really delete?";
    setTimeout(back, 5000);
  };
}

/** A video's first frame, or what has become of it. */
export async function fill(shot, { id, status, frames }) {
  const words = { queued: "waits", in_progress: "is being made", failed: "failed", completed: "has no frames" };
  if (status !== "completed" || frames === 0) {
    return shot.replaceChildren(element("span", { textContent: words[status] ?? "" }));
  }
  const source = await address(`v1/videos/${id}/content?variant=thumbnail`).catch(() => "");
  shot.replaceChildren(element("img", { src: source, alt: "" }));
}
