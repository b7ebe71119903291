#!/usr/bin/env bash
# In a container: Ray on this machine, with its figures at port 8080, and the server of a Serve config until it is stopped.
# usage: container_serve.sh CONFIG [ARGUMENTS of ray start]
set -euo pipefail
config=${1:?Serve config}
folder=$(mktemp -d /tmp/longtake-XXXXXX)
# Whoever reaches Ray can run code: hence a token, which only what runs here can read.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
export OMP_WAIT_POLICY=passive RAY_USAGE_STATS_ENABLED=0
ray start --head --num-cpus=8 --metrics-export-port=8080 --temp-dir="$folder/ray" "${@:2}"
exec serve run --address auto "$config"
