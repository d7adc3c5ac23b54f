# Sourced from the checkout's root. venv_with EXTRA: .venv holds this checkout, editable, with that extra.
# Needs a Python of 3.11 or later with pip or ensurepip; Debian's has pip only, and refuses to install
# beside itself: so the environment is made without pip, and the outer pip works on it.

_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.14 python3.13 python3.12}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "needs Python 3.11 or later: set PYTHON to one" >&2
    return 1
}

# make_venv FOLDER
make_venv() {
    local python
    python=$(_python)
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip "$1"
    elif "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$1"
    else
        echo "$python has neither pip nor ensurepip: apt-get install python3-pip" >&2
        return 1
    fi
}

# pip_in FOLDER ARGUMENTS...
pip_in() {
    local folder=$1 python
    shift
    if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        "$folder/bin/python" -m pip --disable-pip-version-check "$@"
    else
        python=$(_python)
        "$python" -m pip --disable-pip-version-check --python "$folder/bin/python" "$@"
    fi
}

venv_with() {
    local extra=$1 wanted
    .venv/bin/python -c '' 2>/dev/null || make_venv .venv
    wanted=$(cat pyproject.toml kvpersist/__init__.py | sha256sum)
    # what the tests need holds every other extra
    for stamp in ".venv/.installed-$extra" .venv/.installed-test; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$PWD $wanted" ]; then return; fi
    done
    echo "installing kvpersist[$extra] into .venv" >&2
    pip_in .venv install --quiet --editable ".[$extra]"
    echo "$PWD $wanted" >".venv/.installed-$extra"
}

# What is written on the way stays in the checkout, and goes when the script ends.
own_tmp() {
    mkdir -p .cache
    TMPDIR=$(mktemp -d "$PWD/.cache/run.XXXXXX")
    chmod 711 "$TMPDIR" # some tests become another user, who has to get through
    export TMPDIR
    _at_end="$_at_end; rm -rf '$TMPDIR'"
}

# Servers that run already are used; those that this script starts live beside it, and end with it. Call it before
# own_tmp: their folder is where every user can get, with a short path. Who sets KVPERSIST_SERVICES_DIR ends them.
own_services() {
    local python
    if [ -n "${KVPERSIST_SERVICES_DIR:-}" ]; then return; fi
    python=$(_python)
    eval "$("$python" "$PWD/tests/services/up" --running)"
    KVPERSIST_SERVICES_DIR=$(mktemp -d "${TMPDIR:-/tmp}/kvpersist-run.XXXXXX")
    export KVPERSIST_SERVICES_DIR
    _at_end="$_at_end; '$python' '$PWD/tests/services/down' 2>/dev/null; rm -rf '$KVPERSIST_SERVICES_DIR'"
}

_at_end="set +e"
trap 'eval "$_at_end"' EXIT
