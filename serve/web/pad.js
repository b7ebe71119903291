// What a person does with a session: moves held on the keyboard, on the buttons, or by dragging over the picture.

const KEYS = {
  KeyW: "forward",
  KeyS: "back",
  KeyA: "left",
  KeyD: "right",
  ArrowLeft: "turn-left",
  ArrowRight: "turn-right",
  ArrowUp: "up",
  ArrowDown: "down",
};
const FAR = 24; // pixels that a drag goes before it is one

export class Pad {
  #held = new Map(); // by what holds them: the moves
  #pressed = new Set(); // since `take`, also if they were let go

  /** screen: what is dragged over; buttons: each with data-move; changed: called when something else is held. */
  constructor(screen, buttons, changed) {
    this.active = false;
    this.changed = changed;
    this.buttons = [...buttons];
    addEventListener("keydown", (event) => this.#key(event, true));
    addEventListener("keyup", (event) => this.#key(event, false));
    addEventListener("blur", () => this.release());
    for (const button of buttons) this.#button(button);
    this.#drag(screen);
  }

  /** What is held now or was pressed since this was asked last. */
  take() {
    const found = new Set([...this.#pressed, ...this.held()]);
    this.#pressed.clear();
    return found;
  }

  held() {
    return new Set([...this.#held.values()].flat());
  }

  release() {
    this.#held.clear();
    this.#show();
  }

  #hold(by, moves) {
    if (!this.active && moves.length) return;
    this.#held.set(by, moves);
    if (!moves.length) this.#held.delete(by);
    for (const move of moves) this.#pressed.add(move);
    this.#show();
  }

  #show() {
    const held = this.held();
    for (const button of this.buttons) button.classList.toggle("held", held.has(button.dataset.move));
    this.changed();
  }

  #key(event, down) {
    const move = KEYS[event.code];
    const typing = event.target.closest?.("input, textarea, select, dialog, video");
    if (!this.active || !move || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!event.repeat) this.#hold(event.code, down ? [move] : []);
  }

  #button(button) {
    const { move } = button.dataset;
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      this.#hold(button, [move]);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      button.addEventListener(end, () => this.#hold(button, []));
    }
    const press = (down) => (event) => {
      if (event.code !== "Space" && event.code !== "Enter") return;
      event.preventDefault();
      if (!event.repeat) this.#hold(button, down ? [move] : []);
    };
    button.addEventListener("keydown", press(true));
    button.addEventListener("keyup", press(false));
    button.addEventListener("blur", () => this.#hold(button, []));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  #drag(screen) {
    let from = null;
    screen.addEventListener("pointerdown", (event) => {
      if (!this.active || event.target.closest("button")) return;
      from = event;
      screen.setPointerCapture(event.pointerId);
    });
    screen.addEventListener("pointermove", (event) => {
      if (event.pointerId !== from?.pointerId) return;
      const [x, y] = [event.clientX - from.clientX, event.clientY - from.clientY];
      const moves = [];
      if (Math.abs(x) > FAR) moves.push(x > 0 ? "turn-right" : "turn-left");
      if (Math.abs(y) > FAR) moves.push(y > 0 ? "down" : "up");
      if (`${moves}` !== `${this.#held.get(screen) ?? []}`) this.#hold(screen, moves);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      screen.addEventListener(end, (event) => {
        if (event.pointerId !== from?.pointerId) return;
        from = null;
        this.#hold(screen, []);
      });
    }
  }
}
