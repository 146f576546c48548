#!/bin/sh
# An update: it is installed by the very INSTALL.sh that this server kept from the bundle before, and takes its commands and options.
set -u
LC_ALL=C
export LC_ALL
MILKTEA_BUNDLE=$(cd "$(dirname "$0")" && pwd) || exit 2
export MILKTEA_BUNDLE
wanted=@SHA256@
if [ "$(id -u)" = 0 ]; then prefix=/opt/milktea; else prefix=${HOME:-/var/tmp}/milktea; fi
also='' last=''
for word in "$@"; do
    case $last in
        --prefix) prefix=$word ;;
        --also) also="$also$word/INSTALL.sh
" ;;
    esac
    last=$word
done
for file in "$prefix"/kept/*/*/"$wanted"; do also="$also$file
"; done
found=$(printf '%s' "$also" | while read -r file; do
    if [ -f "$file" ] && [ "$(sha256sum <"$file" | cut -c 1-64)" = "$wanted" ]; then
        echo "$file"
        break
    fi
done)
if [ -n "$found" ]; then exec sh "$found" "$@"; fi
printf 'REFUSED: %s\n  server:  %s\n  do this: %s\n' \
    "this is an update, and the INSTALL.sh that it builds on (sha256 $wanted) is not in $prefix/kept" "as it was before" \
    "say with --prefix DIR where the bundle before was installed, or carry a full bundle and name it with --also DIR" >&2
exit 3
