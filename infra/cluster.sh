#!/usr/bin/env bash
# A one-node Ray cluster with its dashboard, for development: on the loopback interface alone, until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
folder=$(mktemp -d /tmp/longtake-XXXXXX)
trap 'rm -rf "$folder"' EXIT
# Whoever reaches Ray can run code, other users of this machine included: hence a token of its own, readable by you alone.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
# The second variable makes Ray bind to 127.0.0.1, where it would otherwise take the machine's outer address.
export OMP_WAIT_POLICY=passive RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
echo "In the shell of your job:"
echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
# 8 logical CPUs: with 2, actors that hold both would leave none for the tasks that they wait for.
ray start --head --block --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --num-cpus=8 --temp-dir="$folder" "$@"
