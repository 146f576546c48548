
# --- the story -------------------------------------------------------------------------------------------------------------

install() {
    preflight
    print_checks
    if [ "$FAILED" -gt 0 ]; then
        [ -n "$FORCE" ] || die 3 "$FAILED of the checks above say no" "mend what they name, in that order, and run this again (--force goes on all the same)"
        say "note  going on although $FAILED checks say no (--force)"
    fi
    [ -n "$ENGINE" ] || die 3 "no Docker engine" "see the check named engine"
    lock
    REF_BEFORE=$($DOCKER image inspect --format '{{.Id}}' "$REF" 2>/dev/null) || REF_BEFORE=
    say "verify every volume, before anything is loaded"
    if [ "$START" -lt "$DEPTH" ]; then verify_or_repair 'parts/*'; fi
    restore_papers
    load_image
    # after the image, which lends its Python to hash them
    if [ -n "$MODELS" ] && rows model | { read -r _; }; then TOUCHED=yes; install_models; fi
    prove
    activate
    record
    rm -rf "$PREFIX/repaired/$ID"
    say "DONE  $REF is current; try: $PREFIX/bin/milktea-run check"
}

lock() {
    local _holder
    mkdir -p "$PREFIX/state" 2>/dev/null || die 3 "cannot write to $PREFIX" "run this as root, or choose another folder: --prefix DIR"
    if ! mkdir "$PREFIX/state/lock" 2>/dev/null; then
        _holder=$(cat "$PREFIX/state/lock/pid" 2>/dev/null)
        if [ -n "$_holder" ] && kill -0 "$_holder" 2>/dev/null; then
            die 8 "another INSTALL.sh works here (process $_holder)" "wait until it is done"
        fi
        say "note  an earlier run was cut off; going on where it was"
        drop_spools
    fi
    LOCKED=yes
    echo $$ >"$PREFIX/state/lock/pid"
    # layers and spools may be gigabytes: keep them on the disk that was measured, not in /tmp
    mv "$WORK" "$PREFIX/state/work.$$" && WORK=$PREFIX/state/work.$$
    FACTS=$(paper FACTS)
}

drop_spools() { rm -rf "$PREFIX"/state/work.*; }

verify() {
    local _verdict _sep _v _why
    if verify_volumes 'parts/*' 'models/*' 'parity/*'; then
        _verdict=whole
    else
        _verdict=damaged
    fi
    if [ -n "$JSON" ]; then
        printf '{"bundle":%s,"signature":%s,"verdict":"%s","bad":[' "$(json_str "$NAME $ID")" "$(json_str "$SIGNED")" "$_verdict"
        _sep=
        while read -r _v _why; do
            printf '%s{"file":%s,"why":%s}' "$_sep" "$(json_str "$_v")" "$(json_str "$_why")"
            _sep=,
        done <"$WORK/bad"
        printf ']}\n'
    fi
    say_bad
    [ $_verdict = whole ] || die 4 "damaged or missing:$(while read -r _v _; do printf ' %s' "$_v"; done <"$WORK/bad")" \
        "sh INSTALL.sh repair rebuilds one volume of each parity group; else copy them again from the sender's disk"
    say "whole: $(rows vol | wc -l) volumes, signature $SIGNED (hashed by $VOLUMES_BY)"
}

repair() {
    lock
    verify_or_repair 'parts/*' 'models/*' 'parity/*'
    say "whole: what was rebuilt lies in $PREFIX/repaired/$ID, where install looks first"
}

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            install | preflight | verify | repair | rollback | status | prune) COMMAND=$1 ;;
            --prefix | --also | --key)
                [ $# -ge 2 ] || { usage >&2; exit 2; }
                case $1 in
                    --prefix) PREFIX=$2 ;;
                    --also) ALSO="$ALSO$2
" ;;
                    --key) KEY=$2; [ -f "$2" ] || { echo "REFUSED: --key $2 does not exist" >&2; exit 2; } ;;
                esac
                shift ;;
            --require-signature) NEED_SIGNATURE=yes ;;
            --json) JSON=yes ;;
            --no-models) MODELS= ;;
            --force) FORCE=yes ;;
            -h | --help) usage; exit 0 ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
    case $PREFIX in /*) ;; *) PREFIX=$(pwd)/$PREFIX ;; esac
    if [ -n "$JSON" ]; then exec 3>&2; else exec 3>&1; fi
    REF_BEFORE='' STAGES='' LOST=''
    WORK=$(mktemp -d) || exit 3
    trap leave EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    choose_hasher
    is_a_bundle
    # the list first, by its signature; then what it lists
    case $COMMAND in preflight | status | rollback | prune) SIGNED="not looked at" ;; *) check_signature ;; esac
    verify_small
    read_plan
    case $COMMAND in
        preflight)
            preflight
            if [ -n "$JSON" ]; then json_preflight; fi
            print_checks
            [ "$FAILED" = 0 ] || exit 3 ;;
        *) $COMMAND ;;
    esac
}

# The whole script is read before its last line runs it: a damaged one does nothing.
main "$@"
exit $?
