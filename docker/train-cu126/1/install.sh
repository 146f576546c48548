#!/bin/sh
# Fills /layers/NAME with what pip installs for each group of wheels: offline, every hash checked, nothing compiled.
# sh install.sh PYTHON EPOCH
set -eu
umask 022
python=$1 epoch=$2

venv=/layers/venv/opt/venv
mkdir -p "$venv/bin" "$venv/lib/python$python/site-packages"
ln -s "/usr/bin/python$python" "$venv/bin/python"
ln -s python "$venv/bin/python3"
ln -s python "$venv/bin/python$python"
ln -s lib "$venv/lib64"
printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\nexecutable = /usr/bin/python%s\n' \
  "$python" "$python" >"$venv/pyvenv.cfg"
mkdir -p /opt
cp -a /layers/venv/opt/venv /opt/venv

pip=$(echo /work/wheels/pip-*.whl)/pip # Python runs it from inside its wheel
for group in /work/groups/*.txt; do
  name=$(basename "$group" .txt)
  /opt/venv/bin/python -B "$pip" install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-warn-script-location --no-index --find-links /work/wheels --no-deps --no-compile --require-hashes --ignore-installed \
    --root "/layers/$name" --prefix /opt/venv -r "$group"
  site=/layers/$name/opt/venv/lib/python$python/site-packages
  while read -r pattern; do
    find "$site" -path "$site/$pattern" ! -type d -delete
    find "/layers/$name/opt/venv" -path "/layers/$name/opt/venv/$pattern" ! -path "$site/*" ! -type d -delete
  done </work/prune.txt
  find "/layers/$name" -mindepth 1 -type d -empty -delete
done
find /layers -exec touch --no-dereference --date="@$epoch" {} +
