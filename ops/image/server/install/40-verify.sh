
# --- verify: signature, then every file by itself --------------------------------------------------------------------------

# The key is, in this order: --key, the key of the first install here, the bundle's own (which proves only wholeness).
check_signature() {
    local _e _file
    SIGNED=none
    for _file in $(rows signature); do
        [ -f "$BUNDLE/$_file" ] || die 4 "$_file is missing: this bundle was signed" "copy $_file from the sender's disk again"
    done
    if [ ! -f "$BUNDLE/SHA256SUMS.sig" ] && [ ! -f "$BUNDLE/SHA256SUMS.openssl" ]; then
        SIGNED="not signed"
    elif has ssh-keygen && [ -f "$BUNDLE/SHA256SUMS.sig" ] && ssh-keygen -Y sign 2>&1 | head -c 400 | { read -r _e; [ "${_e#*unknown option}" = "$_e" ]; }; then
        allowed_signers >"$WORK/allowed" || die 2 "--key $KEY is not a public key of ssh-keygen" "give the sender's .pub file"
        if ssh-keygen -Y verify -f "$WORK/allowed" -I milktea-release -n milktea-bundle -s "$BUNDLE/SHA256SUMS.sig" \
            <"$BUNDLE/SHA256SUMS" >"$WORK/signature" 2>&1; then
            SIGNED="good, by ssh-keygen, $TRUST"
            openssl_agrees || die 4 "SHA256SUMS.openssl is damaged (the signature of ssh-keygen is good)" "copy SHA256SUMS.openssl from the sender's disk again"
        else
            wrong_signature
        fi
    elif has openssl && [ -f "$BUNDLE/SHA256SUMS.openssl" ]; then
        trusted release.pem >"$WORK/release.pem"
        if openssl dgst -sha256 -verify "$WORK/release.pem" -signature "$BUNDLE/SHA256SUMS.openssl" "$BUNDLE/SHA256SUMS" >"$WORK/signature" 2>&1; then
            SIGNED="good, by openssl, $TRUST"
        else
            wrong_signature
        fi
    else
        SIGNED="not checked: neither ssh-keygen nor openssl here"
    fi
    case $SIGNED in
        good*) ;;
        *)
            # a server that once installed a signed bundle takes no unsigned one: leaving the signature out must not help
            [ -f "$PREFIX/keys/allowed_signers" ] && [ "$SIGNED" = "not signed" ] && NEED_SIGNATURE=yes
            [ -n "$NEED_SIGNATURE$KEY" ] && die 5 "the signature is $SIGNED" "install openssh-client or openssl, or ask the sender for a signed bundle"
            say "note  signature $SIGNED. Compare this with what the sender told you: SHA256SUMS is $(sum_of_stdin <"$BUNDLE/SHA256SUMS")"
            ;;
    esac
}

# The other signature, where it can be checked with the bundle's own key: a damaged copy is no use to the next server.
openssl_agrees() {
    [ -f "$BUNDLE/SHA256SUMS.openssl" ] && has openssl || return 0
    own_key_is_whole release.pem
    openssl dgst -sha256 -verify "$BUNDLE/keys/release.pem" -signature "$BUNDLE/SHA256SUMS.openssl" "$BUNDLE/SHA256SUMS" >/dev/null 2>&1
}

wrong_signature() {
    die 5 "wrong signature: SHA256SUMS was not signed by the key that is trusted here ($TRUST)" \
        "do not install it; ask the sender whether the key changed, and give the new one with --key FILE only if they say so by another way than this disk"
}

trusted() { # trusted FILE: the key file to believe; says which in TRUST
    if [ -n "$KEY" ]; then TRUST="with the key given by --key"; cat "$KEY"
    elif [ -f "$PREFIX/keys/$1" ]; then TRUST="with the key of the first install here"; cat "$PREFIX/keys/$1"
    else
        TRUST="with the bundle's own key, not compared with anything"
        own_key_is_whole "$1"
        cat "$BUNDLE/keys/$1"
    fi
}

# A damaged copy of the bundle's own key must not look like a forged signature.
own_key_is_whole() {
    local _sha _path _listed=''
    while read -r _sha _path; do [ "$_path" = "keys/$1" ] && _listed=$_sha; done <"$BUNDLE/SHA256SUMS"
    [ -f "$BUNDLE/keys/$1" ] && [ -n "$_listed" ] && [ "$(sum_of_stdin <"$BUNDLE/keys/$1")" = "$_listed" ] ||
        die 4 "keys/$1 is missing or damaged (or SHA256SUMS is)" "copy keys/$1 and SHA256SUMS from the sender's disk again"
}

allowed_signers() {
    local _first _rest
    trusted allowed_signers >"$WORK/key" || return 1
    read -r _first _rest <"$WORK/key"
    case $_first in
        ssh-* | ecdsa-* | sk-*) printf 'milktea-release namespaces="milktea-bundle" %s %s\n' "$_first" "$_rest" ;;
        milktea-release) cat "$WORK/key" ;;
        *) return 1 ;;
    esac
}

# INSTALL.sh, PLAN and the other small files against SHA256SUMS; they are needed to trust anything else.
verify_small() {
    local _sha _path _p _mine _plan
    : >"$WORK/small"
    while read -r _sha _path; do
        case $_sha-${#_sha}-$_path in
            *[!0-9a-f]*-64-* | *-64-*[!A-Za-z0-9._/+-]*) _path= ;;
            *-64-?*) ;;
            *) _path= ;;
        esac
        [ -n "$_path" ] || die 4 "SHA256SUMS is damaged: one of its lines is not a hash and a path" "copy SHA256SUMS from the sender's disk again"
        case $_path in
            parts/* | models/* | parity/*) ;;
            *)
                [ -f "$BUNDLE/$_path" ] || die 4 "$_path is missing (or SHA256SUMS is damaged)" "copy $_path and SHA256SUMS from the sender's disk again"
                echo "$BUNDLE/$_path" >>"$WORK/small" ;;
        esac
    done <"$BUNDLE/SHA256SUMS"
    [ -s "$WORK/small" ] || die 4 "SHA256SUMS is damaged: it names no file" "copy SHA256SUMS from the sender's disk again"
    set --
    while read -r _p; do set -- "$@" "$_p"; done <"$WORK/small"
    sums "$@" >"$WORK/small.sums"
    _mine='' _plan=''
    while read -r _sha _path; do
        case $_path in parts/* | models/* | parity/*) continue ;; esac
        [ "$_path" = INSTALL.sh ] && _mine=yes
        [ "$_path" = PLAN ] && _plan=yes
        listed "$_sha" "$BUNDLE/$_path" "$WORK/small.sums" ||
            die 4 "$_path is damaged, or belongs to another bundle" "copy $_path from the sender's disk again"
    done <"$BUNDLE/SHA256SUMS"
    [ -n "$_mine$_plan" ] && [ "$_mine" = "$_plan" ] || die 4 "SHA256SUMS is damaged: INSTALL.sh or PLAN is not in it" "copy SHA256SUMS from the sender's disk again"
}

listed() { # listed HEX PATH SUMS: the sums file has this hash for this path
    local _h _p
    while read -r _h _p; do
        [ "${_p#\*}" = "$2" ] && { [ "$_h" = "$1" ]; return; }
    done <"$3"
    return 1
}

# verify_volumes FILTER...: each volume by itself, several at a time. Fills "good" (PATH PLACE) and "bad" (PATH WHY).
verify_volumes() {
    local _v _bytes _sha _group _take _f _at _is _else
    : >"$WORK/good.new"
    : >"$WORK/bad"
    : >"$WORK/todo"
    : >"$WORK/todo.paths"
    rm -f "$WORK/good"
    while read -r _v _bytes _sha _group; do
        _take=
        # shellcheck disable=SC2254
        for _f in "$@"; do case $_v in $_f) _take=yes ;; esac; done
        [ -n "$_take" ] || continue
        _at=$(where "$_v") || { echo "$_v missing" >>"$WORK/bad"; continue; }
        echo "$_v $_bytes $_sha $_at" >>"$WORK/todo"
        _is=$(stat -c %s "$_at" 2>/dev/null || echo 0)
        [ "$_is" = "$_bytes" ] && echo "$_bytes $_at" >>"$WORK/todo.paths"
    done <<ROWS
$(volumes parity)
ROWS
    sort -rn "$WORK/todo.paths" | while read -r _bytes _at; do echo "$_at"; done >"$WORK/todo.sorted"
    hash_all "$WORK/todo.sorted" "$WORK/vol.sums"
    while read -r _v _bytes _sha _at; do
        if listed "$_sha" "$_at" "$WORK/vol.sums"; then
            echo "$_v $_at" >>"$WORK/good.new"
        else
            _is=$(stat -c %s "$_at" 2>/dev/null || echo 0)
            if _else=$(elsewhere "$_v" "$_sha" "$_at"); then echo "$_v $_else" >>"$WORK/good.new"
            elif [ "$_is" != "$_bytes" ]; then echo "$_v $_is bytes instead of $_bytes" >>"$WORK/bad"
            else echo "$_v damaged, or of another bundle" >>"$WORK/bad"; fi
        fi
    done <"$WORK/todo"
    mv "$WORK/good.new" "$WORK/good"
    [ ! -s "$WORK/bad" ]
}

elsewhere() { # elsewhere VOLUME DIGEST NOT_HERE: another place that has it whole
    local _p
    places "$1" >"$WORK/places"
    while read -r _p; do
        [ -f "$_p" ] && [ "$_p" != "$3" ] || continue
        [ "$(sum_of_volume <"$_p")" = "$2" ] && { echo "$_p"; return 0; }
    done <"$WORK/places"
    return 1
}

say_bad() {
    local _v _why
    while read -r _v _why; do say "BAD   $_v: $_why"; done <"$WORK/bad"
}

# --- repair: one lost volume of each parity group is the XOR of the others ------------------------------------------------

# repair_bad: rebuild what "bad" lists into PREFIX/repaired. Names what it cannot.
repair_bad() {
    local _hopeless _v _why
    _hopeless=''
    cp "$WORK/bad" "$WORK/bad.before"
    while read -r _v _why; do
        case $_v in
            parity/*) ;; # the volumes themselves are whole; the next copy of the disk will have it again
            *) rebuild "$_v" <&6 || _hopeless="$_hopeless $_v" ;;
        esac
    done 6<&0 <"$WORK/bad.before"
    [ -z "$_hopeless" ] && return 0
    LEFT="as it was before, but for rebuilt volumes in $PREFIX/repaired"
    die 4 "cannot be rebuilt:$_hopeless ($PARITY_WHY)" "copy again from the sender's disk into the same folder:$_hopeless"
}

rebuild() { # rebuild VOLUME
    local _lost _group _size _want _v _bytes _sha _g _out
    _lost=$1 _group='' _size='' _want=''
    while read -r _v _bytes _sha _g; do
        [ "$_v" = "$_lost" ] && _group=$_g _size=$_bytes _want=$_sha
    done <<ROWS
$(volumes)
ROWS
    PARITY_WHY="this bundle carries no parity for it"
    [ "$_group" != - ] || return 1
    set --
    while read -r _v _bytes _sha _g; do
        [ "$_g" = "$_group" ] && [ "$_v" != "$_lost" ] || continue
        PARITY_WHY="two volumes of parity group $_group are lost: $_lost and $_v"
        is_good "$_v" "$_sha" || return 1
        set -- "$@" "$FOUND"
    done <<ROWS
$(volumes parity)
ROWS
    PARITY_WHY="neither perl nor python3 here, and no image of ours to borrow one from; repair on another machine: sh INSTALL.sh repair --prefix DIR"
    choose_xor || return 1
    _out=$PREFIX/repaired/$ID/$_lost
    mkdir -p "$(dirname "$_out")" || return 1
    say "      rebuilding $_lost ($(human "$_size")) from the $# others of its parity group"
    PARITY_WHY="no room in $PREFIX, or a volume cannot be read"
    xor_files "$_size" "$_out.part" "$@" || { rm -f "$_out.part"; return 1; }
    PARITY_WHY="the volumes changed while they were read"
    [ "$(sum_of_volume <"$_out.part")" = "$_want" ] || { rm -f "$_out.part"; return 1; }
    mv "$_out.part" "$_out"
}

is_good() { # is_good VOLUME DIGEST: whole here, and where (FOUND)
    local _gv _real
    FOUND=$(where "$1") || return 1
    if [ -f "$WORK/good" ]; then
        while read -r _gv _real; do
            [ "$_gv" = "$1" ] && return 0
        done <"$WORK/good"
    fi
    [ "$(sum_of_volume <"$FOUND")" = "$2" ] && return 0
    FOUND=$(elsewhere "$1" "$2" "$FOUND")
}

choose_xor() {
    for XOR in perl python3; do has $XOR && return 0; done
    # Debian's base has perl: an image of ours that is here, or the first part of this bundle, can lend it.
    for XOR in $(candidates) "$STAIR-01"; do
        $DOCKER run --rm --network=none --entrypoint perl "$XOR" -e 1 >/dev/null 2>&1 && return 0
    done
    return 1
}

XOR_PERL='my ($left, $out, @in) = @ARGV;
my @h = map { open my $f, "<:raw", $_ or exit 1; $f } @in;
open my $o, ">:raw", $out or exit 1;
while ($left > 0) {
    my $n = $left < 1048576 ? $left : 1048576;
    my $acc = "\0" x $n;
    for my $f (@h) { defined(read $f, my $b, $n) or exit 1; $acc ^= $b }
    print $o $acc or exit 1;
    $left -= $n;
}
close $o or exit 1;'

xor_files() { # xor_files SIZE OUT FILE...: the shorter files count as followed by zeros
    case $XOR in
        perl) perl -e "$XOR_PERL" "$@" ;;
        python3) python3 -c 'import sys
left, files = int(sys.argv[1]), [open(p, "rb") for p in sys.argv[3:]]
with open(sys.argv[2], "wb") as out:
    while left > 0:
        n = min(left, 1 << 14); acc = 0  # larger numbers are slower
        for f in files: acc ^= int.from_bytes(f.read(n).ljust(n, b"\0"), "little")
        out.write(acc.to_bytes(n, "little")); left -= n' "$@" ;;
        *)
            $DOCKER run --rm --network=none --read-only --user "$(id -u):$(id -g)" -v "$BUNDLE:$BUNDLE:ro" -v "$PREFIX:$PREFIX" \
                --entrypoint perl "$XOR" -e "$XOR_PERL" "$@" ;;
    esac
}

verify_or_repair() { # verify_or_repair FILTER...
    local _v _why
    verify_volumes "$@" && return 0
    say_bad
    LOST=$(while read -r _v _; do printf ' %s' "$_v"; done <"$WORK/bad")
    [ -w "$(existing "$PREFIX")" ] || die 4 "damaged or missing:$LOST" "copy these again from the sender's disk, or: sh INSTALL.sh repair --prefix DIR with a folder that can be written to"
    repair_bad
    verify_volumes "$@" && return 0
    while read -r _v _why; do
        case $_v in parity/*) ;; *) die 4 "still damaged after repair: $_v ($_why)" "copy $_v from the sender's disk again" ;; esac
    done <"$WORK/bad"
}
