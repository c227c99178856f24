# Sourced by ./privgrad and ./test: a virtual environment in .venv, made or renewed when what it is made from changed.
# $1: the extra to install ("" or "[test]"). Only Python 3.11 or later is needed before.
set -eu
cd "$(dirname "$0")"
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "privgrad needs Python 3.11 or later on the PATH" >&2
    exit 2
fi
wanted="$(cat pyproject.toml constraints.txt | cksum) ${1:-}"
installed="$(cat .venv/installed 2>/dev/null || true)"
if [ "$installed" != "$wanted" ] && [ "$installed" != "$wanted[test]" ]; then
    echo "setting up .venv (once; torch is a large download) ..." >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${1:-}" >&2
    echo "$wanted" > .venv/installed
fi
