#!/usr/bin/env bash
# Distils `tiny` to chunks of four steps on one machine with one GPU, from rendering the first clip to a weights folder,
# RUNS/tiny-streaming. It goes on where it was cut short.
# usage: [CLIPS=2000] [LONG_CLIPS=800] [CAUSAL=8] [ODE=3] [MINUTE=4] [LONG_ODE=5] [FEW=5] [REFINER=3.3]
#        infra/distill_tiny.sh RUNS [TEACHER]
#
# TEACHER: a weights folder, by default weights/tiny. Minutes of learning: CAUSAL, to see no later chunk; ODE, to jump along
# the teacher's ways from noise to clips of 5 seconds; MINUTE, of the teacher itself on 15 seconds, which it must last for
# its students to; LONG_ODE, along its ways of these; FEW, by matching its videos; REFINER, of the second stage, by blocks, beside
# what TEACHER makes of these clips' noisy latents. Every run is at RUNS/NAME with its log RUNS/NAME.log.
set -euo pipefail
runs=$(realpath -m "${1:?folder of the runs}") teacher=$(realpath "${2:-$(dirname "$0")/../weights/tiny}")
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD:${PYTHONPATH-}"
mkdir -p "$runs"

job() { # NAME JOB ARGUMENTS
  [ -f "$runs/$1.done" ] && return
  python3 "jobs/$2.py" "${@:3}" > "$runs/$1.log" 2>&1
  touch "$runs/$1.done"
  echo "$1: $(tr '\r' '\n' < "$runs/$1.log" | tail -n 1)"
}
render() { # NAME ARGUMENTS
  OMP_NUM_THREADS=1 job "$1" render_worlds --split train --store "$runs/$1" "${@:2}"
}
latents() { # CLIPS FRAMES
  job "$1-latents" encode_latents --data "$runs/$1" --latents "$runs/$1-latents" --weights "$teacher" --frames "$2" --batch 2
}
ways() { # CLIPS TEACHER
  job "$1-ways" make_trajectories --data "$runs/$1-latents" --weights "$2" --trajectories "$runs/$1-ways" --batch 8
}

render clips --clips "${CLIPS:-2000}" --seed 11
render long --clips "${LONG_CLIPS:-800}" --frames 241 --seed 12
latents clips 81
latents long 241
ways clips "$teacher"
long="--set frames=241 --set batch_size=16 --set ema=0.995"
job causal stage4_causal --data "$runs/clips-latents" --init "$teacher" --run "$runs/causal" \
  --set frames=81 --set batch_size=64 --max-minutes "${CAUSAL:-8}"
job ode stage4_ode --data "$runs/clips-ways" --init "$runs/causal" --run "$runs/ode" --set ema=0.995 --max-minutes "${ODE:-3}"
job minute stage3_minute --data "$runs/long-latents" --init "$teacher" --run "$runs/minute" \
  --set frames=241 --set batch_size=16 --max-minutes "${MINUTE:-4}"
ways long "$runs/minute"
# shellcheck disable=SC2086  # several words
job long-ode stage4_ode --data "$runs/long-ways" --init "$runs/ode" --run "$runs/long-ode" $long \
  --set options.history_noise=0.3 --set learning_rate=3e-4 --max-minutes "${LONG_ODE:-5}"
# shellcheck disable=SC2086
job few stage4_distill --data "$runs/long-ways" --init "$runs/long-ode" --teacher "$runs/minute" --run "$runs/few" $long \
  --set options.generator_every=3 --set learning_rate=6e-6 --max-minutes "${FEW:-5}"
job pairs make_pairs --data "$runs/long-latents" --pairs "$runs/pairs" --weights "$teacher" --sigmas 0.6 0.75 0.9 \
  --num-steps 4 --batch 8
job refiner stage5_refiner --data "$runs/pairs" --init "$teacher" --run "$runs/refiner" --set options.pairs=True \
  --set frames=241 --set batch_size=16 --set model.refiner.block_size=3 --set "model.refiner.sigmas=(0.4,0.25,0.12,0.0)" \
  --max-minutes "${REFINER:-3.3}"
job streaming export_weights --preset tiny-streaming --source tiny --init "$teacher" "$runs/few" "$runs/refiner" \
  --out "$runs/tiny-streaming"
cp -r "$teacher/images" "$runs/tiny-streaming/"
echo "$runs/tiny-streaming"
