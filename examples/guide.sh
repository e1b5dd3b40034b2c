#!/bin/sh
# The requests of docs/API.md with curl, one after the other:
#
#     FORGE_URL=http://127.0.0.1:8600 FORGE_KEY=… sh examples/guide.sh mei
#
# Without FORGE_KEY it works with a `forge dev` on this machine.
set -eu

# [setup]
url=${FORGE_URL:-http://127.0.0.1:8600}
api=$url/api/v1/comfyui
user=${1:-mei}

ask() {
    curl -sS -H "X-Forge-User: $user" ${FORGE_KEY:+-H} ${FORGE_KEY:+"Authorization: Bearer $FORGE_KEY"} "$@"
}
first() { grep -o "\"$1\":\"[^\"]*\"" | head -n 1 | cut -d '"' -f 4; } # jq does this better
# [end]

# [catalogue]
ask "$api/catalogue" | grep -o '"job_type":"[^"]*"'
# [end]

# [submit]
job=$(ask -X POST "$api/jobs" -H 'Content-Type: application/json' -H "Idempotency-Key: $user-sword" \
    -d '{"job_type": "ui_icon", "params": {"kind": "weapon", "element": "fire", "width": 256, "height": 256}}' |
    first id)
# [end]
echo "job $job"

# [poll]
until ask "$api/jobs/$job" | grep -qE '"status":"(completed|failed|cancelled)"'; do
    sleep 1
done
# [end]

# [file]
picture=$url$(ask "$api/jobs/$job" | first url)
ask "$picture" -D headers.txt -o sword.png
etag=$(grep -i '^etag:' headers.txt | cut -d ' ' -f 2 | tr -d '\r')
ask "$picture" -H "If-None-Match: $etag" -o /dev/null -w 'again: %{http_code}\n' # 304
# [end]

# [retry]
ask --retry 5 "$api/limits" # curl waits as long as Retry-After says
# [end]
echo

# [upload]
upload=$(ask -X POST "$api/uploads" -F image=@sword.png | first id)
# [end]
echo "upload $upload"

# [regenerate]
asset=$(basename "$(dirname "$picture")")
again=$(ask -X POST "$api/assets/$asset/regenerate" -H "Idempotency-Key: $user-sword-again" | first id)
# [end]
echo "asset $asset again: job $again"

# [wrong]
ask -X POST "$api/jobs" -H 'Content-Type: application/json' -d '{"job_type": "ui_icon", "params": {"kind": "spoon"}}'
# [end]
