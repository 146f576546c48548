#!/bin/sh
# Brings the milktea bundle in this folder onto a server without a network, proves it, and can take it back.
# Needs sh, docker and coreutils. openssl, python3, perl and ssh-keygen are used where they are, and missed where they are not.
# Runs in dash, busybox ash and bash. Killed anywhere and started again, it finishes.
# shellcheck shell=dash
set -u
LC_ALL=C
export LC_ALL
umask 022

usage() {
    cat <<'TEXT'
usage: sh INSTALL.sh [COMMAND] [OPTIONS]
  install      check the server, verify every volume, load, prove, and make it the current one (the default)
  preflight    only check the server: what was measured, what is needed, what to do     (changes nothing)
  verify       only check every file of the bundle and its signature                    (changes nothing)
  repair       rebuild lost or damaged volumes from parity into PREFIX/repaired
  rollback     make the previous image the current one again
  prune        remove the images before the previous one
  status       what is installed
options:
  --prefix DIR      where models, tools and records go (/opt/milktea for root, else $HOME/milktea)
  --also DIR        look for volumes in DIR as well: other disks, or a full bundle (may be repeated)
  --key FILE        the sender's public key, received by another way than this disk
  --require-signature   stop when the signature cannot be checked here
  --json            preflight, verify and status answer in JSON on stdout; carry preflight's home for a smaller next bundle
  --no-models       leave the base models out
  --force           go on although preflight says no (the record keeps what it said)
exit: 0 done  2 wrong use  3 the server is not ready  4 a file is missing or damaged  5 wrong signature
      6 the engine did not load it  7 the image did not prove itself  8 busy; 3 to 7 leave the server as it was
TEXT
}

BUNDLE=$(cd "${MILKTEA_BUNDLE:-$(dirname "$0")}" && pwd) || exit 2
COMMAND=install PREFIX='' KEY='' JSON='' FORCE='' MODELS=yes NEED_SIGNATURE='' ALSO=''
if [ "$(id -u)" = 0 ]; then PREFIX=/opt/milktea; else PREFIX=${HOME:-/var/tmp}/milktea; fi
# Where the server's own files are seen from, for a rescue shell that has the server mounted elsewhere.
HOST=${MILKTEA_HOST_ROOT:-}
DOCKER=${DOCKER:-docker}
WORK='' LOCKED='' TOUCHED='' FACTS=''

say() { printf '%s\n' "$*" >&3; }

# die CODE WHAT REMEDY: the three parts of every refusal: what happened, how the server is now, what to type next.
die() {
    local _code
    _code=$1
    if [ -n "$TOUCHED" ]; then undo; fi
    printf 'REFUSED: %s\n  server:  %s\n  do this: %s\n' "$2" "${LEFT:-as it was before}" "$3" >&2
    exit "$_code"
}

leave() {
    [ -n "$WORK" ] && rm -rf "$WORK"
    [ -n "$LOCKED" ] && rm -rf "$PREFIX/state/lock"
    WORK='' LOCKED=''
}

# A JSON string of $1, quotes included; control characters become spaces.
json_str() {
    local _in _out _rest _c
    _in=$1 _out=
    while [ -n "$_in" ]; do
        _rest=${_in#?}
        _c=${_in%"$_rest"}
        _in=$_rest
        case $_c in
            '"' | \\) _out=$_out\\$_c ;;
            [[:cntrl:]]) _out="$_out " ;;
            *) _out=$_out$_c ;;
        esac
    done
    printf '"%s"' "$_out"
}

# 12,345,678 bytes as people say it.
human() {
    if [ "$1" -ge 10000000000 ]; then echo "$(($1 / 1000000000)) GB"
    elif [ "$1" -ge 10000000 ]; then echo "$(($1 / 1000000)) MB"
    elif [ "$1" -ge 10000 ]; then echo "$(($1 / 1000)) KB"
    else echo "$1 bytes"; fi
}

# not_below A B: version A is at least version B, compared number by number.
not_below() {
    local _a _b _x _y
    _a=$1. _b=$2.
    while [ -n "$_b" ]; do
        _x=${_a%%.*} _y=${_b%%.*}
        _a=${_a#*.} _b=${_b#*.}
        _x=${_x%%[!0-9]*} _y=${_y%%[!0-9]*}
        # a leading zero would make it octal: 08 is an error, 010 is 8
        while [ "${_x#0}" != "$_x" ] && [ "$_x" != 0 ]; do _x=${_x#0}; done
        while [ "${_y#0}" != "$_y" ] && [ "$_y" != 0 ]; do _y=${_y#0}; done
        [ "${_x:-0}" -gt "${_y:-0}" ] && return 0
        [ "${_x:-0}" -lt "${_y:-0}" ] && return 1
        [ -n "$_a" ] || _a=0.
    done
    return 0
}

has() { command -v "$1" >/dev/null 2>&1; }

# The nearest existing folder of a path: what a question about its disk is asked of.
existing() {
    local _d
    _d=$1
    while [ ! -d "$_d" ] && [ "$_d" != / ]; do _d=$(dirname "$_d"); done
    echo "$_d"
}
