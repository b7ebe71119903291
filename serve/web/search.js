// A search: its candidates beside each other, the best first.

import { address, get } from "./api.js";
import { $, element, pause, tell } from "./dom.js";
import { unfinished } from "./stage.js";
import { fill } from "./takes.js";

let going = new AbortController();
let shown = null;

/** Shows it, and goes on with it until it is done; null: no more. */
export async function showSearch(id) {
  if (id === shown) return;
  shown = id;
  going.abort();
  going = new AbortController();
  const { signal } = going;
  $("#candidates ol").replaceChildren();
  $("#candidates").hidden = id === null;
  const cards = new Map();
  while (id !== null) {
    const search = await get(`v1/searches/${id}`, { signal });
    describe(search, cards);
    if (!unfinished(search)) return;
    await pause(1500);
    if (signal.aborted) return;
  }
}

function describe(search, cards) {
  const { candidates } = search;
  const done = candidates.filter((each) => each.status === "completed").length;
  $("#searching").hidden = !unfinished(search);
  $("#searching").value = search.progress;
  if (search.status === "failed") tell(`The search failed: ${search.error?.message}`, true);
  else tell(unfinished(search) ? `${done} of ${candidates.length} candidates are made.` : "The search is done.");
  const best = [...candidates].sort((one, other) => (other.score ?? -Infinity) - (one.score ?? -Infinity));
  const list = $("#candidates ol");
  best.forEach((each, number) => {
    const card = cards.get(each.video) ?? made(search, each);
    cards.set(each.video, card);
    card.update(each);
    if (list.children[number] !== card.item) list.insertBefore(card.item, list.children[number] ?? null);
  });
  $("#together").disabled = done < 2;
  $("#together").onclick = () => together(cards);
}

function made(search, candidate) {
  const shot = element("button", { type: "button", className: "shot", "aria-label": `Show: ${candidate.actions}` });
  const bar = element("progress", { max: 100, "aria-label": "How much of it is made" });
  const scores = element("dl", { className: "scores" });
  const name = element("h3", { textContent: candidate.actions });
  const facts = element("p", { className: "hint" });
  const item = element("li", { className: "card" }, shot, element("div", {}, name, facts, bar), scores);
  let best = candidate.video; // the refined one, once it is there
  let status = null;
  shot.onclick = () => (location.hash = `${search.id}/${best}`);
  return {
    item,
    shot,
    video: candidate.video,
    update(now) {
      item.classList.toggle("kept", now.kept);
      best = now.refined ?? now.video;
      const score = now.score === null ? "" : ` · score ${now.score.toFixed(2)}`;
      facts.textContent = `seed ${now.seed}${score}${now.refined ? " · refined" : ""}`;
      bar.hidden = !unfinished(now);
      bar.value = now.progress;
      scores.replaceChildren(...Object.entries(now.scores ?? {}).flatMap(([score, value]) => rated(score, value)));
      if (now.status === status) return;
      status = now.status;
      fill(shot, { id: now.video, status });
    },
  };
}

function rated(name, value) {
  const bar = element("progress", { max: 1, value: Math.min(1, Math.max(0, value)), "aria-label": name });
  const number = element("span", { textContent: value.toFixed(2) });
  return [element("dt", { textContent: name }), element("dd", {}, bar, number)];
}

/** All that are whole, from the beginning, at once. */
async function together(cards) {
  const whole = [...cards.values()].filter((card) => card.shot.querySelector("img, video"));
  const videos = whole.map(async ({ shot, video: id }) => {
    let video = shot.querySelector("video");
    if (!video) {
      const source = await address(`v1/videos/${id}/content`);
      video = element("video", { muted: true, playsInline: true, src: source });
      await new Promise((resolve) => (video.oncanplay = video.onerror = resolve));
      shot.replaceChildren(video);
    }
    video.currentTime = 0;
    return video;
  });
  for (const video of await Promise.all(videos)) video.play().catch(() => {});
}
