#!/usr/bin/env bash
# Prints the path of a working Python 3.12, or says loudly that there is none.
# A pyenv shim called python3.12 may exist and yet refuse to run, so every candidate is tried.
set -euo pipefail

candidates=("${PYTHON312:-}" python3.12)
if command -v pyenv >/dev/null 2>&1; then
    candidates+=("$(pyenv root)"/versions/3.12*/bin/python)
fi
candidates+=(/usr/local/bin/python3.12 /opt/homebrew/bin/python3.12 python3)

for candidate in "${candidates[@]}"; do
    if [ -n "$candidate" ] && found=$("$candidate" -c '
import sys
assert sys.version_info[:2] == (3, 12)
print(sys.executable)' 2>/dev/null); then
        echo "$found"
        exit 0
    fi
done

echo "ERROR: no working Python 3.12 was found (tried: ${candidates[*]})." >&2
echo "Install one, or name it: make smoke PYTHON312=/path/to/python3.12" >&2
exit 1
