# Sourced by the other scripts: makes .venv if it is missing, installs with constraints.txt, activates it.
# PYTHON picks the interpreter (3.10 to 3.13); the default is python3.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
