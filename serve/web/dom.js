// A few words for what every part of the page does with the document.

export const $ = (selector) => document.querySelector(selector);

/** An element with properties (or attributes, where there is no such property) and children. */
export function element(name, given = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** What a screen reader says and everybody reads: how the last thing that was asked for goes. */
export function tell(text, wrong = false) {
  const status = $("#status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

export const seconds = (number) => `${Math.round(10 * number) / 10} s`;
export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
