
# --- the plan: PLAN says what this bundle holds, FACTS what its image is; one fact a line, both covered by SHA256SUMS --------

plan() { # plan KEY: the rest of the first line that begins with KEY
    local _k _rest _file
    for _file in "$BUNDLE/PLAN" ${FACTS:+"$FACTS"}; do
        while read -r _k _rest; do
            if [ "$_k" = "$1" ]; then
                echo "$_rest"
                return 0
            fi
        done <"$_file"
    done
    return 1
}

rows() { # rows KEY: the rest of every line that begins with KEY
    local _k _rest _file
    for _file in "$BUNDLE/PLAN" ${FACTS:+"$FACTS"}; do
        while read -r _k _rest; do
            [ "$_k" = "$1" ] && echo "$_rest"
        done <"$_file"
    done
    return 0
}

is_a_bundle() {
    local _f
    for _f in PLAN SHA256SUMS; do
        [ -f "$BUNDLE/$_f" ] || die 4 "$BUNDLE/$_f is missing: this is not a whole bundle" "copy $_f from the sender's disk again"
    done
    [ "$(plan milktea-bundle)" = 3 ] || die 4 "PLAN is damaged, or of a newer milktea than this INSTALL.sh" "copy the whole bundle again"
    NAME=$(plan name) ID=$(plan id) KIND=$(plan kind)
}

# After PLAN has proved whole. An update makes its facts of those that the server kept.
read_plan() {
    local _n _diff _rest _reuse _rebuilt _state
    read_recipes
    [ -f "$BUNDLE/FACTS" ] || restore FACTS || die 3 "FACTS cannot be made of what $PREFIX/kept has" "carry the full bundle of $ID and add --also DIR"
    FACTS=$(paper FACTS)
    REF=$(plan ref) REPO=${REF%:*} CUDA=$(plan cuda) STAIR=$(plan stair)
    _reuse=" $(plan reuse) " _rebuilt=" $(plan rebuilt) "
    rows layer | while read -r _n _rest; do
        _state=other
        case $_reuse in *" $_n "*) _state=reuse ;; esac
        case $_rebuilt in *" $_n "*) _state=rebuilt ;; esac
        echo "$_n $_rest $_state"
    done >"$WORK/layers"
    while read -r _n _diff _rest; do echo "$_diff"; done <"$WORK/layers" >"$WORK/want"
    DEPTH=$(wc -l <"$WORK/want")
    DEPTH=$((DEPTH + 0))
}

# --- finding and hashing -------------------------------------------------------------------------------------------------

# Every place where a file of the bundle may lie, best first.
places() {
    local _d
    echo "$PREFIX/repaired/$ID/$1"
    echo "$BUNDLE/$1"
    printf '%s' "$ALSO" | while read -r _d; do echo "$_d/$1"; done
}

where() { # where FILE: the place that verification found whole, or else the first that exists
    local _p _real
    if [ -f "$WORK/good" ]; then
        while read -r _p _real; do
            if [ "$_p" = "$1" ]; then
                echo "$_real"
                return 0
            fi
        done <"$WORK/good"
    fi
    places "$1" >"$WORK/places"
    while read -r _p; do
        if [ -f "$_p" ]; then
            echo "$_p"
            return 0
        fi
    done <"$WORK/places"
    return 1
}

sums() { # sums FILE...: "HEX *FILE" lines by HASHER; a file that cannot be read gives no line
    case $HASHER in
        b2sum) b2sum -l 256 "$@" ;;
        openssl) openssl dgst -sha256 -r "$@" ;;
        python3) python3 -c 'import hashlib, sys
for p in sys.argv[1:]:
    h = hashlib.sha256()
    with open(p, "rb", buffering=0) as f:
        while b := f.read(1 << 20): h.update(b)
    print(h.hexdigest(), "*" + p)' "$@" ;;
        *) sha256sum "$@" ;;
    esac 2>/dev/null
}

sum_of_stdin() {
    case $HASHER in
        b2sum) b2sum -l 256 ;;
        openssl) openssl dgst -sha256 -r ;;
        python3) python3 -c 'import hashlib, sys
h = hashlib.sha256()
while b := sys.stdin.buffer.read(1 << 20): h.update(b)
print(h.hexdigest())' ;;
        *) sha256sum ;;
    esac 2>/dev/null | cut -c 1-64
}

# HASHER is for SHA-256, VOLUMES_BY for volumes. Coreutils' own sha256sum is 3 to 4 times slower than openssl where it is not
# linked with OpenSSL; where it is all there is, volumes are known by their BLAKE2b digest in the plan, which takes b2sum a third.
choose_hasher() {
    local _h
    for _h in openssl python3; do
        HASHER=$_h VOLUMES_BY=$_h
        if has "$_h" && [ "$(printf x | sum_of_stdin)" = 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881 ]; then return 0; fi
    done
    HASHER=b2sum VOLUMES_BY=b2sum
    [ "$(printf x | sum_of_stdin)" = d161d71145abeec5ef15abcf0459cec60a27321e2f0ac0ef7ace5254f5944476 ] || VOLUMES_BY=sha256sum
    HASHER=sha256sum
}

volumes() { # volumes [parity]: "PATH BYTES DIGEST GROUP" of each volume, and of the parity files; the digest as VOLUMES_BY gives it
    local _v _bytes _sha _group _blake2
    { rows vol; ${1:+rows "$1"}; } | while read -r _v _bytes _sha _group _blake2; do
        [ "$VOLUMES_BY" = b2sum ] && _sha=$_blake2
        echo "$_v $_bytes $_sha $_group"
    done
}

sum_of_volume() { # of stdin, as VOLUMES_BY gives it
    local HASHER=$VOLUMES_BY
    sum_of_stdin
}

# How many hashers run at a time: as many as there are processors, 4 at most.
cores() {
    local _n
    _n=$(nproc 2>/dev/null) || _n=1
    if [ "$_n" -gt 4 ]; then echo 4; else echo "$_n"; fi
}

hash_paths() { # hash_paths LIST: the sums of the volumes whose paths are listed in LIST, one after the other
    local _p _from=$1 HASHER=$VOLUMES_BY
    set --
    while read -r _p; do set -- "$@" "$_p"; done <"$_from"
    sums "$@"
}

# hash_all LIST OUT: the sums of the paths listed in LIST, several at a time.
# Paths come largest first, dealt in turn, so that the shares are about equal.
hash_all() {
    local _shares _i _p _s
    _shares=$(cores)
    rm -f "$WORK"/share.* "$WORK"/sums.*
    _i=0
    while read -r _p; do
        echo "$_p" >>"$WORK/share.$_i"
        _i=$(((_i + 1) % _shares))
    done <"$1"
    for _s in "$WORK"/share.*; do
        [ -f "$_s" ] || continue
        hash_paths "$_s" >"$WORK/sums.${_s##*.}" &
    done
    wait
    cat "$WORK"/sums.* >"$2" 2>/dev/null || : >"$2"
}

# same_prefix A B: how many leading lines two files share.
same_prefix() {
    local _n _x _y
    _n=0
    while read -r _x <&4 && read -r _y <&5; do
        [ "$_x" = "$_y" ] || break
        _n=$((_n + 1))
    done 4<"$1" 5<"$2"
    echo "$_n"
}

# join_volumes V1,V2,...: the bytes of a file that may have been split into volumes.
join_volumes() {
    local _list _v _real
    _list=$1
    while [ -n "$_list" ]; do
        _v=${_list%%,*}
        _real=$(where "$_v") || return 1
        cat "$_real" || return 1
        case $_list in *,*) _list=${_list#*,} ;; *) _list= ;; esac
    done
}
