// Where keys lead the camera, seen from above: drawn from keys, and keys found for what a person draws.

/** Names of what a camera does, as (forward, right, yaw to the right, pitch up). */
export const MOVES = {
  forward: [1, 0, 0, 0],
  back: [-1, 0, 0, 0],
  right: [0, 1, 0, 0],
  left: [0, -1, 0, 0],
  "turn-right": [0, 0, 1, 0],
  "turn-left": [0, 0, -1, 0],
  up: [0, 0, 0, 1],
  down: [0, 0, 0, -1],
};

const RADIANS = Math.PI / 180;
const still = () => ({ x: 0, z: 0, yaw: 0, pitch: 0, velocity: [0, 0, 0, 0] });

/** The letters of a model's keys that do these moves. */
export function letters(moves, steering) {
  const letterOf = (move) => Object.keys(steering.keys).find((key) => `${steering.keys[key]}` === `${MOVES[move]}`);
  return [...moves].map(letterOf).join("") || "none";
}

/** [keys, frames] of "w-48,dw-24"; null where it is no such text. */
export function parsed(text, steering) {
  const found = [];
  for (const piece of text.toLowerCase().replace(/\s/g, "").split(",")) {
    const [, keys, frames] = piece.match(/^([a-z]+)-(\d+)$/) ?? [];
    if (!(frames > 0) || (keys !== "none" && [...keys].some((key) => !(key in steering.keys)))) return null;
    found.push([keys === "none" ? "" : keys, Number(frames)]);
  }
  return found;
}

export const written = (pieces) => pieces.map(([keys, frames]) => `${keys || "none"}-${frames}`).join(",");
export const lengthOf = (pieces) => pieces.reduce((sum, [, frames]) => sum + frames, 0);

/** The same with `keys` held for so many frames more. */
export function longer(pieces, keys, frames) {
  const last = pieces.at(-1);
  if (last?.[0] !== keys) return [...pieces, [keys, frames]];
  return [...pieces.slice(0, -1), [keys, last[1] + frames]];
}

/** The poses after each frame, from `from` on, as model/camera/actions.py moves a camera. */
export function rollOut(pieces, { steering, fps }, from = still()) {
  const poses = [from];
  for (const [keys, frames] of pieces) {
    const target = [0, 0, 0, 0];
    for (const key of new Set(keys)) steering.keys[key].forEach((value, axis) => (target[axis] += value));
    for (let frame = 0; frame < frames; frame++) poses.push(moved(poses.at(-1), target, steering, 1 / fps));
  }
  return poses;
}

function moved(pose, target, steering, time) {
  const velocity = pose.velocity.map((value, axis) => {
    const tau = target[axis] ? steering.press : steering.coast;
    return value + (tau ? 1 - Math.exp(-time / tau) : 1) * (target[axis] - value);
  });
  const [forward, right, turn, lift] = velocity.map((value) => value * time);
  const yaw = pose.yaw + turn * steering.rotation_speed * RADIANS;
  const raised = pose.pitch + lift * steering.rotation_speed * RADIANS;
  const pitch = Math.abs(raised) <= steering.pitch_limit * RADIANS ? raised : pose.pitch;
  const x = pose.x + steering.translation_speed * (forward * Math.sin(yaw) + right * Math.cos(yaw));
  const z = pose.z + steering.translation_speed * (forward * Math.cos(yaw) - right * Math.sin(yaw));
  return { x, z, yaw, pitch, velocity };
}

/** Keys that lead a camera along points {x, z} in metres, in at most so many frames: it looks a little ahead on the
 * line, turns where it stands when that lies far aside, and walks on. */
export function follow(points, model, most) {
  const { steering } = model;
  const ahead = 0.3;
  const step = Math.max(1, Math.round(model.fps / 4));
  const coasting = steering.coast * steering.rotation_speed * RADIANS; // what it still turns after a key was let go
  const last = points.length - 1;
  let pieces = [];
  let pose = still();
  let next = 0;
  while (lengthOf(pieces) + step <= most) {
    while (next < last && Math.hypot(points[next].x - pose.x, points[next].z - pose.z) < ahead) next++;
    const [x, z] = [points[next].x - pose.x, points[next].z - pose.z];
    const aside = Math.atan2(x, z) - pose.yaw - pose.velocity[2] * coasting;
    const error = Math.atan2(Math.sin(aside), Math.cos(aside));
    const left = Math.hypot(x, z);
    if (next === last && (left < 0.1 || (left < 0.5 && Math.abs(error) > 1))) break;
    const moves = Math.abs(error) > 0.5 ? [] : ["forward"];
    if (Math.abs(error) > 0.05) moves.push(error > 0 ? "turn-right" : "turn-left");
    const keys = letters(moves, steering);
    pieces = longer(pieces, keys, step);
    pose = rollOut([[keys, step]], model, pose).at(-1);
  }
  return pieces;
}
