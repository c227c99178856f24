# Sourced by ./privgrad and ./test: a virtual environment in .venv, made or renewed when what it is made from changed.
# Set by the caller (a POSIX shell passes no arguments to a sourced file): root, the checkout; extra, "" or "[test]".
# Only Python 3.11 or later is needed before.
set -eu
python=""
for candidate in python3 python3.13 python3.12 python3.11; do
    # Asked, not only looked for: a name on the PATH may be a version manager's stand-in for a version that is not there.
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "privgrad needs Python 3.11 or later, with its venv module, on the PATH" >&2
    exit 2
fi
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $extra"
installed="$(cat "$root/.venv/installed" 2>/dev/null || true)"
if [ "$installed" != "$wanted" ] && [ "$installed" != "${wanted}[test]" ]; then
    echo "setting up .venv (once; torch is a large download) ..." >&2
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root$extra" >&2
    echo "$wanted" > "$root/.venv/installed"
fi
