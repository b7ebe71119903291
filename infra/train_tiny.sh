#!/usr/bin/env bash
# Trains `tiny` on one machine with two GPUs, from rendering the first clip to a weights folder, RUNS/tiny.
# usage: [MINUTES=28] [CLIPS=5000] [LONG_CLIPS=120] [VAE_UNTIL=40] infra/train_tiny.sh RUNS [WEIGHTS]
#
# Both GPUs train the autoencoder, then encode, then train the world model on 5 s; at last GPU 1 teaches it a minute
# beside GPU 0, which trains the refiner. WEIGHTS: a folder to start from, then without stage 1. Every run is at
# RUNS/NAME with its log RUNS/NAME.log.
#
# VAE_UNTIL: percent of the time by which the autoencoder is done. A world model that starts from weights is quick to
# learn new latents, so give it more then. SETTINGS: more arguments for all stages.
set -uo pipefail
runs=$(realpath -m "${1:?folder of the runs}") old=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.." || exit
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD:${PYTHONPATH-}" TORCHINDUCTOR_CACHE_DIR=$runs/inductor
begin=${BEGIN:-$(date +%s)} length=$((60 * ${MINUTES:-28})) clips=${CLIPS:-5000} long_clips=${LONG_CLIPS:-120}
vae_until=${VAE_UNTIL:-40}
startup=${STARTUP:-75} # seconds from a job's start to its first step
mkdir -p "$runs"

seconds() { echo $(($(date +%s) - begin)); }
job() { # NAME GPU JOB ARGUMENTS
  local name=$1 gpu=$2 status=0
  CUDA_VISIBLE_DEVICES=$gpu ${with-} python3 "jobs/$3.py" "${@:4}" > "$runs/$name.log" 2>&1 || status=$?
  echo "$(seconds) s: $name ended with $status: $(tr '\r' '\n' < "$runs/$name.log" | tail -n 1)"
  return $status
}
stage() { # NAME GPU STAGE ARGUMENTS, which end with the percent of the time by which to be done
  local left=$((length * ${*: -1} / 100 - $(seconds) - startup)) minutes
  minutes=$(python3 -c "print(max(0.2, $left / 60))")
  job "$1" "$2" "$3" --run "$runs/$1" --max-minutes "$minutes" "${@:4:$#-4}" ${SETTINGS-}
}
render() { # NAME WORKERS ARGUMENTS
  with=nice OMP_NUM_THREADS=1 job "render-$1" "" render_worlds --split train --store "$runs/$1" --workers "$2" "${@:3}"
}
encode() { # GPU CLIPS LATENTS ARGUMENTS
  job "encode-$2" "$1" encode_latents --data "$runs/$2" --weights "$runs/vae" --latents "$runs/$3" "${@:4}"
}

cores=$(nproc)
render clips "$cores" --clips $((clips / 2)) --seed 1
(
  render more $((cores / 2)) --clips $((clips / 2)) --seed 2
  render long $((cores / 2)) --clips "$long_clips" --frames 961 --seed 3
) &
rendering=$!
stage vae 0,1 stage0_vae --data "$runs/clips" ${old:+--init "$old"} --workers 2 "$vae_until" || exit
wait $rendering

encode 0 clips latents &
encoding=$!
encode 1 more latents
wait $encoding
encode 0 long latents-long --frames 961 --batch 1 &
encoding=$!
if [ -z "$old" ]; then
  stage gdn 0,1 stage1_gdn --data "$runs/latents" --init "$runs/vae" --workers 2 65 || exit
fi
stage hybrid 0,1 stage2_hybrid --data "$runs/latents" --init "${old:-$runs/gdn}" --init "$runs/vae" --workers 2 82 || exit
wait $encoding

cp -r "$runs/hybrid/weights" "$runs/stage1"
[ -z "$old" ] || cp -r "$old/refiner" "$runs/stage1/"
stage refiner 0 stage5_refiner --data "$runs/latents" --init "$runs/stage1" 98 &
stage minute 1 stage3_minute --data "$runs/latents-long" --init "$runs/hybrid" 98
wait

rm -rf "$runs/tiny" && cp -r "$runs/minute/weights" "$runs/tiny"
mkdir "$runs/tiny/curves"
for curve in "$runs"/*/loss.png; do cp "$curve" "$runs/tiny/curves/$(basename "$(dirname "$curve")").png"; done
rm -rf "$runs/tiny/refiner" && cp -r "$runs/refiner/weights/refiner" "$runs/tiny/"
echo "$(seconds) s: $runs/tiny"
