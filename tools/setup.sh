#!/bin/sh
# Makes .venv and installs diptych into it with the pinned versions; does nothing when that is already done.
# Usage: tools/setup.sh [EXTRAS]   for example `tools/setup.sh test,dev`. PYTHON=... names the interpreter to start from.
# Knows pip only as `pip install`: where packages come from is the user's own pip configuration.
set -eu
cd "$(dirname "$0")/.."

extras=${1:-}
venv=.venv
stamp=$venv/.installed-$(echo "${extras:-base}" | tr ',' '-')
key="$(pwd) $(cat pyproject.toml constraints.txt | cksum)"

if [ -x "$venv/bin/diptych" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi

say() { printf '\n== %s\n' "$*"; }

# Why this interpreter won't do, or nothing.
refusal() {
    "$1" - 2>/dev/null <<'PYTHON' || echo "does not run"
import sys
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    print("is Python " + version)
else:
    try:
        import ensurepip, venv
    except ImportError as error:
        print("is Python %s without its %s module (Debian and Ubuntu: apt install python%s-venv)" % (version, error.name, version))
PYTHON
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        path=$(command -v "$candidate") || continue
        why=$(refusal "$path")
        if [ -z "$why" ]; then
            echo "$path"
            return
        fi
        echo "  $path $why" >&2
    done
    echo "diptych needs Python 3.11 or newer with the venv module, and found none (looked for: ${PYTHON:-python3, python3.11 ... python3.14})." >&2
    echo "Install one, or name it: make PYTHON=/path/to/python3 ..." >&2
    return 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making $venv with $python"
    "$python" -m venv --clear "$venv"
fi

say "installing diptych${extras:+ with $extras} into $venv (the first time takes minutes: torch and ray are large)"
"$venv/bin/python" -m pip install --constraint constraints.txt --editable ".${extras:+[$extras]}"
echo "$key" >"$stamp"
# What is installed with extras is installed without them too.
echo "$key" >"$venv/.installed-base"
