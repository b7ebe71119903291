// A small map from above: the camera stands below its middle and looks up. One unit is a metre.

const COLOURS = ["--accent", "--second", "--third", "--fourth", "--fifth", "--sixth"];
const AHEAD = 0.72; // of the height lies before the camera

export class Ground {
  #context;
  #canvas;
  #paths = [];
  #line = [];
  #metres = null; // what a person chose for the width
  #pointer = null;

  /** drawn: called with the points {x, z} of a line that a person drew, if they may. */
  constructor(canvas, drawn) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    new ResizeObserver(() => this.#draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    if (drawn) this.#listen(drawn);
  }

  /** Poses of one path, or of several. */
  show(paths) {
    this.#paths = paths;
    this.#draw();
  }

  zoom(factor) {
    this.#metres = Math.min(64, Math.max(1, this.#width * factor));
    this.#draw();
  }

  get #width() {
    if (this.#metres) return this.#metres;
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    let metres = 4;
    const fits = ({ x, z }) => {
      const high = (metres * height) / (width || 1);
      return Math.abs(x) < 0.47 * metres && z < 0.9 * AHEAD * high && -z < 0.9 * (1 - AHEAD) * high;
    };
    while (metres < 64 && !this.#paths.every((path) => path.every(fits))) metres *= 2;
    return metres;
  }

  #listen(drawn) {
    const canvas = this.#canvas;
    const point = (event) => {
      const { clientWidth: width, clientHeight: height } = canvas;
      const scale = width / this.#width;
      return { x: (event.offsetX - width / 2) / scale, z: (AHEAD * height - event.offsetY) / scale };
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#metres = this.#width; // the map keeps still meanwhile
      this.#pointer = event.pointerId;
      this.#line = [{ x: 0, z: 0 }, point(event)];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.#pointer) return;
      this.#line.push(point(event));
      this.#draw();
    });
    const end = (event) => {
      if (event.pointerId !== this.#pointer) return;
      this.#pointer = null;
      const line = evenly(this.#line, 0.05);
      this.#line = [];
      if (event.type === "pointerup" && line.length > 4) drawn(line);
      this.#draw();
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width) return;
    const ratio = self.devicePixelRatio;
    this.#canvas.width = width * ratio;
    this.#canvas.height = height * ratio;
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(name);
    const context = this.#context;
    const metres = this.#width;
    const scale = width / metres;
    context.setTransform(ratio, 0, 0, ratio, width * ratio * 0.5, AHEAD * height * ratio);
    context.lineCap = context.lineJoin = "round";
    this.#grid(width, height, scale, metres > 16 ? 5 : 1, colour);
    this.#paths.forEach((path, number) => this.#path(path, scale, colour(COLOURS[number % COLOURS.length])));
    if (this.#line.length) this.#stroke(this.#line, scale, colour("--muted"), 1.5, [4, 5]);
  }

  #grid(width, height, scale, every, colour) {
    const context = this.#context;
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    context.setLineDash([]);
    context.beginPath();
    const step = scale * every;
    for (let x = step * Math.ceil(-width / 2 / step); x < width / 2; x += step) {
      context.moveTo(x, -height);
      context.lineTo(x, height);
    }
    for (let y = step * Math.ceil(-height / step); y < height; y += step) {
      context.moveTo(-width, y);
      context.lineTo(width, y);
    }
    context.stroke();
    context.fillStyle = colour("--muted");
    context.font = "12px system-ui, sans-serif";
    context.fillText(`${every} m`, -width / 2 + 8, (1 - AHEAD) * height - 8);
  }

  #path(path, scale, colour) {
    const context = this.#context;
    this.#stroke(path, scale, colour, 3, []);
    const { x, z, yaw } = path.at(-1);
    context.save(); // the camera where it ends, and what it sees
    context.translate(x * scale, -z * scale);
    context.rotate(yaw);
    context.fillStyle = colour;
    context.globalAlpha = 0.18;
    context.beginPath();
    context.moveTo(0, 0);
    context.arc(0, 0, 34, -Math.PI / 2 - 0.65, -Math.PI / 2 + 0.65);
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    context.moveTo(0, -8);
    context.lineTo(6, 6);
    context.lineTo(-6, 6);
    context.fill();
    context.restore();
    context.beginPath();
    context.arc(0, 0, 4, 0, 7);
    context.fillStyle = colour;
    context.fill();
  }

  #stroke(points, scale, colour, width, dash) {
    const context = this.#context;
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.setLineDash(dash);
    context.beginPath();
    for (const { x, z } of points) context.lineTo(x * scale, -z * scale);
    context.stroke();
  }
}

/** Points of a line, `step` metres apart. */
function evenly(line, step) {
  const found = [line[0]];
  for (const { x, z } of line) {
    let before = found.at(-1);
    for (let far = Math.hypot(x - before.x, z - before.z); far >= step; far -= step) {
      before = { x: before.x + ((x - before.x) * step) / far, z: before.z + ((z - before.z) * step) / far };
      found.push(before);
    }
  }
  return found;
}
