#!/usr/bin/env bash
# Sets up the environment (once) and regenerates the figures; see --help.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat <<'HELP'
Usage: ./run_all.sh [--test [PYTEST ARGS…] | ISSL RUN OPTIONS…]

  ./run_all.sh                      set up, then draw the figures from the released tables: no data needed
  ./run_all.sh --from encoders --data-root DIR
                                    the tables again, from the released encoders: CIFAR-10, hours of a core
  ./run_all.sh --check --data-root DIR
                                    one of these tables, and is it the same: minutes
  ./run_all.sh --from images --data-root DIR
                                    the encoders, too: CIFAR-10, FairFace, days
  ./run_all.sh --profile quick      the whole machinery, rehearsed with tiny encoders on synthetic images: minutes
  ./run_all.sh --test               set up, then run the tests
  ./run_all.sh --help               this text, and the options of `issl run`

Inside an active environment that has `issl` (conda, venv), that environment is used as it is. Elsewhere
.venv/ is made next to this script with the exact versions of requirements.lock. No root is needed; the
only network access is to the Python package registry.
HELP
}

say() { printf '%s\n' "run_all: $*" >&2; }

find_uv() { # prints the path of uv, installing it into a private venv (.uv/) where there is none
    if command -v uv; then return; fi
    if [ ! -x "$here/.uv/bin/uv" ]; then
        local python=""
        for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        [ -n "$python" ] || { say "error: needs python3 3.11 or newer (or uv) on the PATH"; exit 1; }
        say "installing uv into .uv/ with $("$python" --version)"
        if ! { "$python" -m venv "$here/.uv" && "$here/.uv/bin/pip" install --quiet --disable-pip-version-check uv >&2; }; then
            rm -rf "$here/.uv"
            say "error: uv could not be installed (is there a network, and python's venv module?); install uv yourself"
            exit 1
        fi
    fi
    echo "$here/.uv/bin/uv"
}

set_up() { # sets $python
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python -c 'import importlib.metadata as m; m.version("issl")' 2>/dev/null; then
        python="$(command -v python)"
        say "using the active environment ($python)"
        return
    fi
    python="$here/.venv/bin/python"
    local want
    want="$(cat "$here/requirements.lock" "$here/pyproject.toml" | cksum) $here"
    if [ -x "$python" ] && [ "$(cat "$here/.venv/.issl-synced" 2>/dev/null)" = "$want" ]; then
        return
    fi
    local uv
    uv="$(find_uv)"
    say "setting up .venv/ from requirements.lock (some minutes the first time: PyTorch is large)"
    [ -x "$python" ] || "$uv" venv --quiet --python '>=3.11' "$here/.venv"
    "$uv" pip sync --quiet --python "$python" --require-hashes "$here/requirements.lock"
    "$uv" pip install --quiet --python "$python" --no-deps --no-build-isolation --editable "$here"
    echo "$want" >"$here/.venv/.issl-synced"
    say "environment ready"
}

case "${1:-}" in
--help | -h)
    usage
    if [ -x "$here/.venv/bin/issl" ]; then "$here/.venv/bin/issl" run --help; fi
    ;;
--test)
    shift
    set_up
    say "running the tests"
    cd "$here"
    # a package's bytecode is worth keeping: importing torch without it takes several times as long
    PYTHONDONTWRITEBYTECODE='' exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
*)
    set_up
    PYTHONDONTWRITEBYTECODE='' exec "$python" -m issl run "$@"
    ;;
esac
