// What a person asks for: the image, the words, and where the camera goes.

import { ask, get } from "./api.js";
import { $, element, seconds, tell } from "./dom.js";
import { Ground } from "./ground.js";
import { follow, lengthOf, letters, longer, parsed, rollOut, written } from "./path.js";

const MOST_BYTES = 2 << 20; // of a file that is sent as it is
const MOST_PIXELS = 2048; // a side, of one that is not
const OWN = "own image"; // no file of the server's has this name
const refused = () => tell("This image cannot be read: choose a PNG, JPEG or WebP.", true);
const KNOWN = ["image/png", "image/jpeg", "image/webp", "image/bmp"];

export class Ask {
  #form = $("#ask");
  #fields = $("#ask").elements;
  #images = new Map(); // by id: the file, its address, and what is to be seen

  /** chosen: called with the address of an image. */
  constructor(model, chosen) {
    this.model = model;
    this.chosen = chosen;
    this.ground = new Ground($("#ground"), (line) => this.#draw(line));
    $("#nearer").onclick = () => this.ground.zoom(0.5);
    $("#farther").onclick = () => this.ground.zoom(2);
    $("#refining").hidden = !model.refines;
    this.#fields.seconds.max = model.max_seconds;
    for (const button of document.querySelectorAll("[data-add]")) button.onclick = () => this.#add(button);
    $("#undo").onclick = () => this.#put((this.#path ?? []).slice(0, -1));
    for (const name of ["actions", "candidates", "seconds"]) this.#fields[name].oninput = () => this.#show();
    for (const radio of this.#form.querySelectorAll("[name=mode]")) radio.onchange = () => this.#mode();
    $("#upload").onchange = ({ target }) => target.files[0] && this.#upload(target.files[0]).catch(refused);
    document.ondragover = (event) => event.preventDefault();
    document.ondrop = (event) => {
      event.preventDefault();
      const file = [...event.dataTransfer.files].find((each) => each.type.startsWith("image/"));
      if (file) this.#upload(file).catch(refused);
    };
    this.#mode();
  }

  get mode() {
    return this.#form.querySelector("[name=mode]:checked").value;
  }

  get prompt() {
    return this.#fields.prompt.value;
  }

  /** The images that the server has to begin at. */
  async images() {
    const { data } = await get("v1/images");
    for (const { id, prompt, licence } of data) {
      this.#tile(id, await (await ask(`v1/images/${encodeURIComponent(id)}`)).blob(), prompt);
      $("#licence").textContent = licence && `These are under ${licence}.`;
    }
    if (data.length && !this.#start) this.#choose(data[0].id);
  }

  #tile(id, file, prompt) {
    const source = URL.createObjectURL(file);
    this.#images.set(id, { file, source, prompt });
    const radio = element("input", { type: "radio", name: "start", value: id, onchange: () => this.#choose(id) });
    const image = element("img", { src: source, alt: prompt ?? "Your own image" });
    $("#images .own").before(element("label", { className: "tile" }, radio, image));
  }

  get #start() {
    return this.#form.querySelector("[name=start]:checked")?.value;
  }

  /** The image as a file. An error when none was chosen. */
  get image() {
    const id = this.#start;
    if (id === undefined) throw new Error("Choose an image to begin at.");
    return this.#images.get(id).file;
  }

  /** What POST takes, as a form; what a session takes, as an object. */
  form() {
    const form = new FormData();
    const { actions, candidates, seeds, keep, seconds: lasting } = this.#fields;
    for (const [name, value] of Object.entries(this.common())) form.set(name, value);
    if (lasting.value) form.set("seconds", lasting.value);
    if (this.mode === "search") {
      form.set("candidates", JSON.stringify(this.#lines));
      form.set("seeds", seeds.value);
      form.set("keep", keep.value);
    } else {
      form.set("actions", actions.value);
    }
    form.set("input_reference", this.image, "image");
    return form;
  }

  common() {
    const { prompt, seed, fov_deg: fov, refine } = this.#fields;
    const refined = this.model.refines ? { refine: refine.checked } : {};
    return { prompt: prompt.value, seed: Number(seed.value), fov_deg: Number(fov.value), ...refined };
  }

  async #upload(file) {
    const image = await smaller(file);
    $(`#images [value="${OWN}"]`)?.parentElement.remove();
    this.#tile(OWN, image, null);
    this.#choose(OWN);
  }

  #choose(id) {
    const { source, prompt } = this.#images.get(id);
    const { prompt: field } = this.#fields;
    const given = [...this.#images.values()].some((each) => each.prompt === field.value);
    if (given || !field.value) field.value = prompt ?? "";
    $(`#images [value="${id}"]`).checked = true;
    this.chosen(source);
  }

  #mode() {
    const { mode } = this;
    $("#way").hidden = mode === "live";
    $("#path").hidden = mode !== "path";
    $("#search").hidden = mode !== "search";
    $("#lasting").hidden = mode === "live";
    $("#go").textContent = { path: "Make the video", live: "Begin the take", search: "Search" }[mode];
    const { candidates, actions } = this.#fields;
    if (mode === "search" && !candidates.value) {
      const { steering, chunk } = this.model;
      const ways = [["forward"], ["forward", "turn-left"], ["forward", "turn-right"]];
      candidates.value = [actions.value, ...ways.map((way) => `${letters(way, steering)}-${4 * chunk}`)].join("\n");
    }
    this.#show();
  }

  get #lines() {
    return this.#fields.candidates.value.split("\n").map((line) => line.trim()).filter(Boolean);
  }

  get #path() {
    return parsed(this.#fields.actions.value, this.model.steering);
  }

  #put(pieces) {
    this.#fields.actions.value = written(pieces);
    this.#show();
  }

  #add(button) {
    const moves = button.dataset.add.split(" ").filter(Boolean);
    const keys = moves.length ? letters(moves, this.model.steering) : "";
    this.#put(longer(this.#path ?? [], keys, this.model.chunk));
  }

  #draw(line) {
    const { fps, max_seconds: most } = this.model;
    const pieces = follow(line, this.model, Math.floor(fps * most));
    if (!pieces.length) return;
    if (this.mode === "search") {
      this.#fields.candidates.value = [...this.#lines, written(pieces)].join("\n");
      this.#show();
    } else {
      this.#put(pieces);
    }
  }

  /** The ways on the map, and how long they are. */
  #show() {
    const { steering, fps, max_seconds: most } = this.model;
    const searching = this.mode === "search";
    const texts = searching ? this.#lines : [this.#fields.actions.value];
    const paths = texts.map((text) => parsed(text, steering));
    const right = paths.length > 0 && paths.every(Boolean);
    this.#fields[searching ? "candidates" : "actions"].setAttribute("aria-invalid", !right);
    $("#length").classList.toggle("wrong", !right);
    const all = `${Object.keys(steering.keys).join(" ")} none`;
    if (!right) return ($("#length").textContent = `Write KEYS-FRAMES, such as w-48 or dw-24; keys are ${all}.`);
    const wanted = Math.round(this.#fields.seconds.value * fps);
    const poses = paths.map((pieces) => rollOut(lasting(pieces, wanted || lengthOf(pieces)), this.model));
    this.ground.show(poses);
    const longest = Math.max(...poses.map((path) => path.length - 1)) / fps;
    const over = longest > most ? `: at most ${most} s are made here` : "";
    $("#length").classList.toggle("wrong", Boolean(over));
    const long = seconds(longest);
    const what = searching ? `${paths.length} ways, up to ${long}` : `${long}, ${far(poses[0])} m`;
    $("#length").textContent = `${what}${over || ". Draw on the ground, or add moves."}`;
  }
}

/** Metres that the camera goes. */
function far(poses) {
  const steps = poses.slice(1).map(({ x, z }, at) => Math.hypot(x - poses[at].x, z - poses[at].z));
  return steps.reduce((sum, step) => sum + step, 0).toFixed(1);
}

/** The same, repeated or cut to so many frames. */
function lasting(pieces, frames) {
  const found = [];
  for (let at = 0, left = frames; left > 0; at++) {
    const [keys, held] = pieces[at % pieces.length];
    found.push([keys, Math.min(held, left)]);
    left -= held;
  }
  return found;
}

/** An image as the server takes it: photographs of telephones are larger than they need be. */
async function smaller(file) {
  if (file.size <= MOST_BYTES && KNOWN.includes(file.type)) return file;
  const image = await createImageBitmap(file);
  const scale = Math.min(1, MOST_PIXELS / Math.max(image.width, image.height));
  const [width, height] = [image.width, image.height].map((side) => Math.round(side * scale));
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}
