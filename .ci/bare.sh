#!/usr/bin/env bash
# Runs a command as on a bare machine: its PATH holds python3, make, git, bash, grep, sed and
# coreutils, and nothing else (no ssh, rsync, tar, zstd, docker, strace). Both commands of the README
# work there; tests that need more skip and say so. The emulator's boxes are processes that have the
# system's own PATH, as an image has: sh, tar and setsid, which are on every Linux.
#   .ci/bare.sh make test
set -euo pipefail

coreutils="arch b2sum base32 base64 basename cat chgrp chmod chown cksum comm cp csplit cut date dd df
  dir dirname du echo env expand expr factor false fmt fold groups head hostid id install join link ln
  logname ls md5sum mkdir mkfifo mknod mktemp mv nice nl nohup nproc numfmt od paste pathchk pinky pr
  printenv printf pwd readlink realpath rm rmdir seq sha1sum sha224sum sha256sum sha384sum sha512sum
  shred shuf sleep sort split stat stdbuf stty sum sync tac tail tee test timeout touch tr true
  truncate tsort tty uname unexpand uniq unlink users vdir wc who whoami yes"

jail=$(mktemp -d)
trap 'rm -rf "$jail"' EXIT
for tool in bash sh make git grep sed $coreutils; do
  path=$(type -P "$tool") || continue # some coreutils are not everywhere
  ln -s "$path" "$jail/$tool"
done
# a script, no link: a venv made here links to the interpreter by the name it was started with, and
# has to outlive the jail
python=$(python3 -c 'import sys; print(sys._base_executable)')
printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >"$jail/python3"
chmod +x "$jail/python3"
for tool in bash python3 make git grep sed; do
  [[ -e $jail/$tool ]] || { echo "bare: $tool is not on this machine"; exit 3; }
done
unset PYTHONPATH VIRTUAL_ENV DOCKER_HOST SSH_AUTH_SOCK
PATH=$jail "$@"
