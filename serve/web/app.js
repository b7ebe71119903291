// The page. What is shown is what the address names: #VIDEO, #SEARCH or #SEARCH/VIDEO.

import { askKey, create, get, key, Refused } from "./api.js";
import { Ask } from "./ask.js";
import { $, tell } from "./dom.js";
import { Session } from "./live.js";
import { Pad } from "./pad.js";
import { showSearch } from "./search.js";
import { caption, leave, offer, showStill, showVideo } from "./stage.js";
import { mark, older, refresh } from "./takes.js";

let model;
let asked;
let session = null;
let image = null; // what the chosen start image is shown by
const pad = new Pad($("#screen"), document.querySelectorAll("[data-move]"), () => session && heads());

async function begin() {
  [model] = (await get("v1/models")).data;
  const [width, height] = model.size.split("x");
  document.documentElement.style.setProperty("--ratio", width / height);
  $("#model").textContent = `${model.id} · ${width}×${height} · ${model.fps} frames a second`;
  asked = new Ask(model, (source) => {
    image = source;
    if (!session && !location.hash) still();
  });
  $("#key").hidden = key() === null;
  const known = get("openapi.json");
  await Promise.all([asked.images(), refresh()]);
  $("#can-search").hidden = !("/v1/searches" in (await known).paths);
  addEventListener("hashchange", () => route());
  await route();
}

function still() {
  showStill(image ?? "", "A world begins with an image", "It goes on where you lead the camera.");
}

async function route() {
  const [first, second] = location.hash.slice(1).split("/");
  const search = first.startsWith("search_") ? first : null;
  const video = search ? second : first;
  stop();
  mark(video);
  const searching = showSearch(search);
  if (video) await tried(() => showVideo(video, changed));
  else if (image) still();
  await tried(() => searching);
}

let last = null;
function changed(video) {
  if (`${video.id} ${video.status}` !== last) refresh().catch(() => {});
  last = `${video.id} ${video.status}`;
}

/** Tells what goes wrong, unless it is that something else is shown now. */
async function tried(act) {
  try {
    return await act();
  } catch (error) {
    const message = error instanceof Refused ? error.message : `It did not work: ${error.message}`;
    if (error.name !== "AbortError") tell(message, true);
  }
}

$("#ask").onsubmit = async (event) => {
  event.preventDefault();
  $("#go").disabled = true;
  await tried(async () => {
    tell("It is sent.");
    if (asked.mode === "live") return live();
    const path = asked.mode === "search" ? "v1/searches" : "v1/videos";
    const made = await create(path, asked.form(), (error) => tell(`${error.message}: it is tried again.`));
    location.hash = made.id;
    refresh().catch(() => {});
  });
  $("#go").disabled = false;
  $("#stage").scrollIntoView({ block: "start", behavior: "smooth" });
};

async function live() {
  const start = { ...asked.common(), image: await base64(asked.image) };
  history.replaceState(null, "", location.pathname + location.search);
  stop();
  showSearch(null);
  mark(null);
  leave();
  const video = $("#video");
  video.hidden = false;
  video.controls = false;
  caption(asked.prompt || "A take", "");
  $("#screen").classList.add("live");
  $("#pad").hidden = $("#hud").hidden = false;
  $("#hud").textContent = "beginning";
  session = new Session(start, video, model, pad, heard);
  pad.active = true;
  $("#screen").focus();
  tell("The take begins. Hold W, A, S, D to walk, arrow keys to look.");
}

let took;
function heard(said) {
  if (said.type === "started") refresh().catch(() => {});
  if (said.type === "lost") tell("The connection was lost: it is taken up again.", true);
  if (said.type === "frames") {
    took = said.took ?? took;
    heads();
  }
  if (said.type === "closed") ended(said.reason);
}

/** What the camera is told, over the picture. */
function heads() {
  const moves = [...pad.held()].join(", ").replaceAll("-", " ");
  const late = took === undefined ? "" : ` · ${took.toFixed(1)} s to the picture`;
  $("#hud").textContent = (moves || "still") + late;
}

function ended(reason) {
  const { id } = session;
  stop();
  const why = { ended: "The take has ended.", idle: "The take has ended, since nobody steered." }[reason];
  tell(why ?? `The take has ended: ${reason}`, why === undefined);
  $("#video").controls = true;
  if (id) get(`v1/videos/${id}`).then(offer).then(refresh).catch(() => {});
}

function stop() {
  pad.active = false;
  pad.release();
  session?.close();
  session = null;
  $("#pad").hidden = $("#hud").hidden = true;
  $("#screen").classList.remove("live");
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

$("#end").onclick = () => session?.end();
$("#older").onclick = () => tried(older);
$("#key").onclick = () => tried(async () => {
  await askKey();
  location.reload();
});

tried(begin);
