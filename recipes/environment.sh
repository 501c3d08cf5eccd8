# Sourced by recipes/quickstart.sh and tests/run.sh: make .venv, install the project with one extra ($1), activate it.
# Versions are those of tests/constraints.txt. A second call installs nothing if nothing has changed.
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --upgrade pip
fi
wanted=$(cat pyproject.toml tests/constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat ".venv/installed-$1" 2>/dev/null)" != "$wanted" ]; then
    echo "installing rekatrain[$1] into .venv (a few minutes)"
    .venv/bin/pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e ".[$1]"
    echo "$wanted" >".venv/installed-$1"
fi
source .venv/bin/activate
