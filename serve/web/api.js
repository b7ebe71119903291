// The server's API. One key goes with all requests, where the server wants one; this tab keeps it.

import { $, pause } from "./dom.js";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null;

export const url = (path) => new URL(path, document.baseURI).href;
export const key = () => sessionStorage.getItem("key");

/** The answer to a request, once it is a good one. `options` as fetch's. Refused, with what the server says, or an
 * error of the network. */
export async function ask(path, options = {}) {
  for (;;) {
    const used = key();
    const headers = { ...options.headers, ...(used && { Authorization: `Bearer ${used}` }) };
    const response = await fetch(url(path), { ...options, headers });
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    if (response.status !== 401) {
      throw new Refused(response.status, said.error?.message ?? `the server answers ${response.status}`);
    }
    if (used === key()) await (asking ??= askKey(used !== null).finally(() => (asking = null)));
  }
}

export const get = async (path, options) => (await ask(path, options)).json();

/** Asks for something new, again while the server is too busy; it is made once, however often it is sent. */
export async function create(path, form, waiting) {
  const once = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(16)).join("-");
  for (let tried = 0; ; tried++) {
    try {
      return await get(path, { method: "POST", body: form, headers: { "Idempotency-Key": once } });
    } catch (error) {
      const later = !(error instanceof Refused) || error.status === 429 || error.status === 503;
      if (!later || tried === 3) throw error;
      waiting(error);
      await pause(2000 * 2 ** tried);
    }
  }
}

/** An address that an <img>, <video> or download can use, which send no key. */
export async function address(path) {
  return key() === null ? url(path) : URL.createObjectURL(await (await ask(path)).blob());
}

/** A link that downloads, with the key if there is one. */
export function download(link, path, name) {
  link.href = url(path);
  link.download = name;
  link.onclick = async (event) => {
    if (key() === null || link.href.startsWith("blob:")) return;
    event.preventDefault();
    link.href = await address(path);
    link.click();
  };
}

/** Has a person type the key. Refused when they will not. */
export function askKey(wrong = false) {
  const dialog = $("#keys");
  const input = dialog.querySelector("input");
  $("#wrong-key").hidden = !wrong;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => {
      if (dialog.returnValue !== "use") return reject(new Refused(401, "this server wants a key"));
      sessionStorage.setItem("key", input.value.trim());
      resolve();
    };
  });
}
