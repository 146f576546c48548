
# --- prove, make current, keep a record, take back -------------------------------------------------------------------------

gpu_flags() {
    [ "$CUDA" = none ] && return
    case $($DOCKER info --format '{{json .Runtimes}}' 2>/dev/null) in
        *nvidia*) echo "--gpus all" ;;
        *) echo "--device nvidia.com/gpu=all" ;;
    esac
}

# The image proves itself: no network, nothing writable but /tmp. Its answer is JSON on stdout.
prove() {
    local _program _limit _rc _said
    TOUCHED=yes
    say "prove the self-test runs with no network and a read-only image"
    set -- $(plan prove)
    _program=$1
    shift
    _limit=
    has timeout && _limit="timeout 1800"
    mkdir -p "$PREFIX/models"
    # shellcheck disable=SC2046
    $_limit $DOCKER run --rm --network=none --read-only --tmpfs /tmp:rw,exec,mode=1777 --cap-drop=ALL --security-opt no-new-privileges \
        --shm-size 1g -e HOME=/tmp -e MILKTEA_MODELS=/run/milktea/models -v "$PREFIX/models:/run/milktea/models:ro" \
        -v "$(paper image.lock):/run/milktea/image.lock:ro" $(gpu_flags) \
        --entrypoint "$_program" "$REF" "$@" >"$WORK/selftest" 2>"$WORK/selftest.err"
    _rc=$?
    [ $_rc = 0 ] && return 0
    _said=$(tail -c 400 "$WORK/selftest.err" | tr '\n' ' ')
    die 7 "the self-test of $REF failed with exit code $_rc: $_said" "send $(keep_failure) to the sender; the image that was current before still is"
}

keep_failure() {
    mkdir -p "$PREFIX/records"
    { cat "$WORK/selftest"; echo; cat "$WORK/selftest.err"; } >"$PREFIX/records/selftest-failed-$ID.txt"
    echo "$PREFIX/records/selftest-failed-$ID.txt"
}

state_of() { # state_of current|previous
    local _k _ref
    [ -f "$PREFIX/state/$NAME" ] || return 1
    while read -r _k _ref; do
        [ "$_k" = "$1" ] && { echo "$_ref"; return 0; }
    done <"$PREFIX/state/$NAME"
    return 1
}

write_state() { # write_state CURRENT PREVIOUS: the file is the truth, the tags follow it
    { echo "current $1"; [ -n "$2" ] && echo "previous $2"; } >"$PREFIX/state/$NAME.part"
    mv "$PREFIX/state/$NAME.part" "$PREFIX/state/$NAME"
    echo "$NAME" >"$PREFIX/state/default.part" && mv "$PREFIX/state/default.part" "$PREFIX/state/default"
    $DOCKER tag "$1" "$REPO:current"
    if [ -n "$2" ]; then $DOCKER tag "$2" "$REPO:previous"; fi
}

activate() {
    local _before _f
    _before=$(state_of current) || _before=
    if [ "$_before" = "$REF" ]; then _before=$(state_of previous) || _before=; fi
    mkdir -p "$PREFIX/bin" "$PREFIX/tools" "$PREFIX/keys" "$PREFIX/records"
    for _f in $(rows tool); do
        mkdir -p "$(dirname "$PREFIX/tools/$_f")"
        cp "$(paper "tools/$_f")" "$PREFIX/tools/$_f.part" && mv "$PREFIX/tools/$_f.part" "$PREFIX/tools/$_f"
    done
    cp "$(paper image.lock)" "$PREFIX/records/image.lock.part" && mv "$PREFIX/records/image.lock.part" "$PREFIX/records/image-$ID.lock"
    cp "$(paper tools/milktea-run)" "$PREFIX/bin/milktea-run.part" && chmod 755 "$PREFIX/bin/milktea-run.part"
    mv "$PREFIX/bin/milktea-run.part" "$PREFIX/bin/milktea-run"
    case $SIGNED in
        good*) # the next bundle must come from the same sender
            for _f in allowed_signers release.pem; do
                [ -f "$PREFIX/keys/$_f" ] || [ ! -f "$BUNDLE/keys/$_f" ] || cp "$BUNDLE/keys/$_f" "$PREFIX/keys/$_f"
            done ;;
    esac
    keep_files
    write_state "$REF" "$_before"
    drop_kept
    TOUCHED=
}

record() {
    local _when _sep _l
    mkdir -p "$PREFIX/records"
    _when=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    {
        printf '{"milktea_install":1,"when":"%s","who":%s,"server":%s,\n' "$_when" "$(json_str "$(id -un)")" "$(json_str "$(uname -n)")"
        printf '"bundle":{"name":%s,"id":%s,"kind":%s,"sha256sums":"%s","signature":%s,"volumes_verified":%d,"rebuilt_from_parity":%s},\n' \
            "$(json_str "$NAME")" "$(json_str "$ID")" "$(json_str "$KIND")" "$(sum_of_stdin <"$BUNDLE/SHA256SUMS")" "$(json_str "$SIGNED")" \
            "$(rows vol | wc -l)" "$(json_str "${LOST:-}")"
        printf '"image":{"ref":%s,"id":%s,"previous":%s,"layers":[' "$(json_str "$REF")" "$(json_str "$($DOCKER image inspect --format '{{.Id}}' "$REF")")" \
            "$(json_str "$(state_of previous)")"
        _sep=
        while read -r _l; do
            printf '%s"%s"' "$_sep" "$_l"
            _sep=,
        done <"$WORK/want"
        printf ']},\n"sbom":'
        if [ -f "$(paper sbom/image.cdx.json)" ]; then printf '"%s"' "$(sum_of_stdin <"$(paper sbom/image.cdx.json)")"; else printf null; fi
        printf ',\n"preflight":'
        json_preflight
        printf ',"selftest":'
        case $(head -c 1 "$WORK/selftest") in '{') cat "$WORK/selftest" ;; *) json_str "$(head -c 2000 "$WORK/selftest" | tr '\n' ' ')" ;; esac
        printf '}\n'
    } >"$PREFIX/records/install.json.part"
    mv "$PREFIX/records/install.json.part" "$PREFIX/records/INSTALL-$ID-$_when.json"
    cp "$PREFIX/records/INSTALL-$ID-$_when.json" "$PREFIX/INSTALL-RECORD.json.part"
    mv "$PREFIX/INSTALL-RECORD.json.part" "$PREFIX/INSTALL-RECORD.json"
    evidence
}

# A page for the security officer, made inside the image and signed with this server's own key.
evidence() {
    local _page _file
    _page=$PREFIX/EVIDENCE.html
    if plan evidence >/dev/null; then
        $DOCKER run --rm -i --network=none --read-only --tmpfs /tmp -v "$PREFIX/tools:/tools:ro" --entrypoint "$(plan evidence)" "$REF" \
            /tools/evidence.py <"$PREFIX/INSTALL-RECORD.json" >"$_page.part" 2>"$WORK/evidence.err" || {
            say "note  no evidence page: $(head -c 200 "$WORK/evidence.err" | tr '\n' ' ')"
            rm -f "$_page.part"
        }
        [ -f "$_page.part" ] && mv "$_page.part" "$_page"
    fi
    for _file in "$PREFIX/INSTALL-RECORD.json" "$_page"; do [ -f "$_file" ] && sign_here "$_file"; done
    return 0
}

sign_here() {
    local _key
    _key=$PREFIX/keys/server
    mkdir -p "$PREFIX/keys"
    rm -f "$1.sig" "$1.openssl"
    if has ssh-keygen; then
        [ -f "$_key" ] || ssh-keygen -q -t ecdsa -b 256 -m PEM -N '' -C "milktea server $(uname -n)" -f "$_key" </dev/null
        ssh-keygen -q -Y sign -f "$_key" -n milktea-evidence "$1" 2>/dev/null </dev/null
    elif has openssl; then
        [ -f "$_key" ] || { (umask 077; openssl ecparam -name prime256v1 -genkey -noout -out "$_key") 2>/dev/null; }
    fi
    if has openssl && [ -f "$_key" ]; then
        [ -f "$_key.pem" ] || openssl ec -in "$_key" -pubout -out "$_key.pem" 2>/dev/null
        openssl dgst -sha256 -sign "$_key" -out "$1.openssl" "$1" 2>/dev/null
    fi
    return 0
}

rollback() {
    local _now _back
    _now=$(state_of current) || die 2 "nothing of $NAME is installed in $PREFIX" "sh INSTALL.sh install"
    _back=$(state_of previous) || die 2 "there is no image before $_now" "sh INSTALL.sh status shows what is installed"
    $DOCKER image inspect "$_back" >/dev/null 2>&1 || die 6 "$_back is no longer on the server" "install its bundle again"
    write_state "$_back" "$_now"
    say "current $_back"
    say "before  $_now (sh INSTALL.sh rollback goes forward again)"
}

status() {
    local _now _back
    _now=$(state_of current) || _now=
    _back=$(state_of previous) || _back=
    if [ -n "$JSON" ]; then
        printf '{"image":%s,"current":%s,"previous":%s,"prefix":%s}\n' "$(json_str "$NAME")" "$(json_str "$_now")" "$(json_str "$_back")" "$(json_str "$PREFIX")"
    else
        say "current  ${_now:-nothing installed}"
        say "previous ${_back:-none}"
    fi
}

# Removes the images of this name that are neither the current nor the previous one; asks nothing, says what went.
prune() {
    local _now _back _image
    _now=$(state_of current) || die 2 "nothing of $NAME is installed in $PREFIX" "sh INSTALL.sh install"
    _back=$(state_of previous) || _back=
    $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}' | while read -r _image; do
        case $_image in
            "$_now" | "$_back" | "$REPO:current" | "$REPO:previous") ;;
            *) $DOCKER rmi "$_image" >/dev/null 2>&1 </dev/null && say "removed $_image" ;;
        esac
    done
}
