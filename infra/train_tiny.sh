#!/usr/bin/env bash
# Trains `tiny` on one machine with two GPUs, from rendering the first clip to a weights folder, RUNS/tiny.
# usage: [MINUTES=28] [CLIPS=5600] [LONG_CLIPS=120] [VAE_UNTIL=40] infra/train_tiny.sh RUNS [WEIGHTS]
#
# GPU 0 trains the autoencoder, its decoder alone once the latents are encoded, then the refiner; GPU 1 trains the world
# model. Given weights to start from, GPU 1 need not wait for the new autoencoder: it first learns on latents of the old
# one. Every run is at RUNS/NAME with its log RUNS/NAME.log.
#
# VAE_UNTIL: percent of the time by which the autoencoder is done. A world model that starts from weights is quick to
# learn new latents, so give it more then. SETTINGS: more arguments for all stages.
set -uo pipefail
runs=$(realpath -m "${1:?folder of the runs}") old=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.." || exit
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD:${PYTHONPATH-}" TORCHINDUCTOR_CACHE_DIR=$runs/inductor
begin=${BEGIN:-$(date +%s)} length=$((60 * ${MINUTES:-28})) clips=${CLIPS:-5600} long_clips=${LONG_CLIPS:-120}
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
render() { # NAME ARGUMENTS
  with=nice OMP_NUM_THREADS=1 job "render-$1" "" render_worlds --split train --workers "$(nproc)" \
    --store "$runs/$1" "${@:2}"
}
encode() { # GPU CLIPS WEIGHTS LATENTS ARGUMENTS
  job "encode-$2-$4" "$1" encode_latents --data "$runs/$2" --weights "$3" --latents "$runs/$4" "${@:5}"
}

render clips --clips $((clips / 4)) --seed 1
render more --clips $((clips * 3 / 4)) --seed 2 &
rendering=$!
start=$old
if [ -n "$old" ]; then
  start=$runs/gdn-old
  (
    encode 1 clips "$old" latents-old
    stage gdn-old 1 stage1_gdn --data "$runs/latents-old" --init "$old" $((vae_until - 2))
  ) &
  learning=$!
fi
stage vae 0 stage0_vae --data "$runs/clips" ${old:+--init "$old"} "$vae_until" || exit
wait $rendering ${learning-}

encode 0 clips "$runs/vae" latents &
first=$!
encode 1 more "$runs/vae" latents
wait $first
(
  stage decoder 0 stage0_vae --data "$runs/clips" --init "$runs/vae" \
    --set options.freeze_encoder=True --set seed=1 $((vae_until + 20))
  until [ -d "$runs/gdn/weights" ]; do sleep 5; done
  cp -r "$runs/gdn/weights" "$runs/gdn-early" # the refiner does not wait for the last steps of stage 1
  stage refiner 0 stage5_refiner --data "$runs/latents" --init "$runs/gdn-early" --init "$runs/decoder" 98
) &
(
  render long --clips "$long_clips" --frames 961 --seed 3
  encode 0 long "$runs/vae" latents-long --frames 961 --batch 1
) &
lengthening=$!
stage gdn 1 stage1_gdn --data "$runs/latents" ${start:+--init "$start"} --init "$runs/vae" \
  --set checkpoint_minutes=4 78 || exit
wait $lengthening
stage minute 1 stage3_minute --data "$runs/latents-long" --init "$runs/gdn" 98
wait

rm -rf "$runs/tiny" && cp -r "$runs/minute/weights" "$runs/tiny"
mkdir "$runs/tiny/curves"
for run in vae decoder gdn minute refiner; do cp "$runs/$run/loss.png" "$runs/tiny/curves/$run.png"; done
for part in decoder/weights/vae refiner/weights/refiner; do
  rm -rf "$runs/tiny/$(basename $part)" && cp -r "$runs/$part" "$runs/tiny/"
done
echo "$(seconds) s: $runs/tiny"
