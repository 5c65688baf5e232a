#!/usr/bin/env bash
# One session of the embedded adapter by `dealer`, `serve` and `classify` on three hosts, each a network namespace of this
# machine that reaches the others; prints the client's JSON object. Needs root.
#   tools/three-hosts.sh VEILTUNE DEALER_NS DEALER_ADDRESS PROVIDER_NS PROVIDER_ADDRESS CLIENT_NS CLASSIFY_ARGUMENT...
set -euo pipefail
[ $# -gt 6 ] || { sed -n '2,5s/^# *//p' "$0"; exit 2; }
veiltune=$1 dealer=$2 provider=$4 client=$6 dealer_at=$3:7801 provider_at=$5:7802
shift 6
keys=$(mktemp -d)
trap 'rm -rf "$keys"; kill $(jobs -p) 2>/dev/null || true' EXIT
"$veiltune" keys --out "$keys" >/dev/null
on() { ip netns exec "$1" "$veiltune" "${@:2}"; }
on "$dealer" dealer --listen "$dealer_at" --keys "$keys/dealer" --sessions 1 >/dev/null &
on "$provider" serve --listen "$provider_at" --dealer "$dealer_at" --keys "$keys/provider" --sessions 1 >/dev/null &
on "$client" classify --json --provider "$provider_at" --dealer "$dealer_at" --keys "$keys/client" "$@"
wait
