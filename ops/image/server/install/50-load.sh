
# --- base models: files beside the image, each hashed while it is copied -------------------------------------------------

# A file of a model is hashed while it is copied: both read the same pages at the same time, so the medium is read once, and the
# disk writes meanwhile. A hasher that lags behind goes on while the next file is copied; the medium still sees one reader.

copy_model_file() { begin_copy 0 "$1" "$2"; end_copy 0 "$1" "$2" "$3" "$HASHING"; } # copy_model_file VOLUMES DEST BYTES

begin_copy() { # begin_copy N VOLUMES DEST: DEST is the volumes in a row, on the disk; HASHING hashes them
    rm -f "$3" "$WORK/copied.$1.sums"
    paths_of "$2" >"$WORK/copied.$1.paths" || : >"$WORK/copied.$1.paths"
    if [ -f "$WORK/lent.failed" ]; then end_lending; fi
    if [ -n "$LENT" ]; then
        cat "$WORK/copied.$1.paths" >&9 2>/dev/null
        ln -s "$WORK/lent.sums" "$WORK/copied.$1.sums"
        HASHING=$LENT
    else
        hash_paths "$WORK/copied.$1.paths" >"$WORK/copied.$1.sums" </dev/null &
        HASHING=$!
    fi
    copy_whole "$2" "$3" || rm -f "$3"
}

end_copy() { # end_copy N VOLUMES DEST BYTES HASHING: true if DEST is whole and every volume is the plan's
    { [ -L "$WORK/copied.$1.sums" ] && volumes_fit "$2" "$1"; } || wait "$5"
    [ -f "$3" ] && [ "$(stat -c %s "$3")" = "$4" ] || return 1
    volumes_fit "$2" "$1" && return
    [ -L "$WORK/copied.$1.sums" ] || return 1
    # the image did not say so: ask the server's own hasher
    rm -f "$WORK/copied.$1.sums"
    hash_paths "$WORK/copied.$1.paths" >"$WORK/copied.$1.sums"
    volumes_fit "$2" "$1"
}

# Coreutils hash a gigabyte in 1.5 s at best, the OpenSSL of the image's Python in 0.7. By now the image is loaded, and its layers
# are those of the signed plan: what it says of a file is worth as much as the training that will read the file with the same
# Python. It sees the volumes, read-only, and no network. Where it cannot run, or has no Python, the server hashes by itself.
LENT=''        # the process that hashes the volumes of a model in a container, each from when its copy begins
LEND=500000000 # bytes; a smaller model is hashed sooner than a container starts

begin_lending() { # begin_lending BYTES: paths from lent.paths, written to 9, get their lines in lent.sums
    rm -f "$WORK/lent.failed" "$WORK/lent.ask"
    case $VOLUMES_BY in b2sum | sha256sum) ;; *) return 0 ;; esac
    [ "$1" -ge "$LEND" ] && plan evidence >/dev/null && mkfifo "$WORK/lent.ask" 2>/dev/null || return 0
    { lent_sums <"$WORK/lent.ask" >"$WORK/lent.sums" 2>/dev/null || : >"$WORK/lent.failed"; } &
    LENT=$!
    exec 9>"$WORK/lent.ask"
}

end_lending() {
    exec 9>&-
    LENT=''
}

lent_sums() {
    local _p
    set -- "$REF" -c 'import concurrent.futures, hashlib, mmap, os, sys
def say(path):
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if os.path.getsize(path) else b""
    sys.stdout.write(f"{hashlib.sha256(data).hexdigest()} *{path}\n")
    sys.stdout.flush()
with concurrent.futures.ThreadPoolExecutor(int(sys.argv[1])) as pool:
    for path in sys.stdin: pool.submit(say, path.rstrip("\n"))' "$(cores)"
    while read -r _p; do set -- -v "$_p:$_p:ro" "$@"; done <"$WORK/lent.paths"
    $DOCKER run --rm -i --network=none --read-only --cap-drop=ALL --security-opt no-new-privileges --security-opt label=disable \
        --user "$(id -u):$(id -g)" --entrypoint "$(plan evidence)" "$@"
}

copy_whole() { # copy_whole VOLUMES DEST: a copy in the kernel, or a clone where the file system has them
    local _real
    case $1 in
        *,*) join_volumes "$1" >"$2" || return 1 ;;
        *)
            _real=$(where "$1") || return 1
            cp --reflink=auto "$_real" "$2" 2>/dev/null || cp "$_real" "$2" || return 1 ;;
    esac
    sync "$2" 2>/dev/null || sync
}

paths_of() { # paths_of V1,V2,...: where each lies
    local _list=$1
    while [ -n "$_list" ]; do
        where "${_list%%,*}" || return 1
        case $_list in *,*) _list=${_list#*,} ;; *) _list= ;; esac
    done
}

volumes_fit() { # volumes_fit VOLUMES N: the digests in copied.N.sums are the plan's, in the order of copied.N.paths
    local _list=$1 _path _v _bytes _sha _group _blake2
    while read -r _path <&4; do
        _sha='' _blake2=''
        while read -r _v _bytes _sha _group _blake2; do [ "$_v" = "${_list%%,*}" ] && break; done <<ROWS
$(rows vol)
ROWS
        listed "$_sha" "$_path" "$WORK/copied.$2.sums" || listed "$_blake2" "$_path" "$WORK/copied.$2.sums" || return 1
        _list=${_list#*,}
    done 4<"$WORK/copied.$2.paths"
}

install_models() {
    local _set _bytes _model _license
    mkdir -p "$PREFIX/models" || die 3 "cannot write to $PREFIX/models" "choose another folder: --prefix DIR"
    rows model >"$WORK/models"
    while read -r _set _bytes _model _license; do
        [ -d "$PREFIX/models/$_set" ] || install_model "$_set" "$_model" "$_bytes"
        # by name for people, by content for machines
        mkdir -p "$(dirname "$PREFIX/models/by-name/$_model")"
        ln -sfn "$PREFIX/models/$_set" "$PREFIX/models/by-name/$_model"
    done 8<&0 <"$WORK/models"
}

install_model() { # install_model SET NAME BYTES: appears under its own name only when every file is right
    local _stage _s _fbytes _fsha _path _vols _n=0 _open='' _most
    _stage=$PREFIX/models/.$1.partial
    _most=$(cores)
    STAGES="$STAGES $_stage"
    mkdir -p "$_stage"
    say "model $2"
    : >"$WORK/mfiles"
    : >"$WORK/mfiles.sums"
    : >"$WORK/lent.paths"
    rows mfile >"$WORK/mfiles.all"
    while read -r _s _fbytes _fsha _path _vols; do
        [ "$_s" = "$1" ] || continue
        echo "$_fsha  $_path" >>"$WORK/mfiles.sums"
        # a file of an interrupted install: it got its name only after it had proved right
        [ -f "$_stage/$_path" ] && continue
        echo "$_vols $_fbytes $_path" >>"$WORK/mfiles"
        paths_of "$_vols" >>"$WORK/lent.paths"
    done <"$WORK/mfiles.all"
    begin_lending "$3"
    while read -r _vols _fbytes _path; do
        mkdir -p "$(dirname "$_stage/$_path")"
        _n=$((_n + 1))
        echo "$_vols $_fbytes $_path" >"$WORK/copying.$_n"
        begin_copy $_n "$_vols" "$_stage/$_path.part"
        _open="$_open$_n:$HASHING "
        while [ -n "$_open" ] && is_hashed "${_open%%:*}" $((_n - _most + 1)); do
            finish_copies "$2" "$_stage" "${_open%% *}"
            _open=${_open#* }
        done
    done <"$WORK/mfiles"
    end_lending
    finish_copies "$2" "$_stage" $_open
    mv "$WORK/mfiles.sums" "$_stage/.sha256"
    chmod -R a-w,a+rX "$_stage"
    chmod u+w "$_stage"
    sync "$_stage" 2>/dev/null || sync
    mv "$_stage" "$PREFIX/models/$1"
}

is_hashed() { # is_hashed N OLD: the image has said what copy N is, or it is so old that its own hasher is waited for
    local _vols _rest
    if [ -n "$LENT" ] && [ -L "$WORK/copied.$1.sums" ]; then
        read -r _vols _rest <"$WORK/copying.$1"
        volumes_fit "$_vols" "$1"
    else
        [ "$1" -le "$2" ]
    fi
}

finish_copies() { # finish_copies NAME STAGE N:HASHING...: a file gets its name when it has proved right
    local _model=$1 _stage=$2 _n _vols _fbytes _path
    shift 2
    for _n in "$@"; do
        read -r _vols _fbytes _path <"$WORK/copying.${_n%:*}"
        if ! end_copy "${_n%:*}" "$_vols" "$_stage/$_path.part" "$_fbytes" "${_n#*:}"; then
            # find out which volume it is, mend it, and read once more
            end_lending
            verify_or_repair $(echo "$_vols" | tr , ' ')
            copy_model_file "$_vols" "$_stage/$_path.part" "$_fbytes" ||
                die 4 "$_path of model $_model does not arrive whole: $_vols" "check the disk of $PREFIX for room and errors, then copy $_vols again"
        fi
        mv "$_stage/$_path.part" "$_stage/$_path"
    done
}

# --- load: a stair of archives that each carry what the one before lacks ---------------------------------------------------

load_image() {
    take_stock
    if [ "$START" -ge "$DEPTH" ] && [ "$START_IMAGE" != "" ] && [ "$(layers_of "$START_IMAGE" | wc -l)" -eq "$DEPTH" ]; then
        # the very layers are here under some name: nothing to load
        [ "$START_IMAGE" = "$REF" ] || $DOCKER tag "$START_IMAGE" "$REF"
        say "image already here, all $DEPTH layers"
        drop_stairs # a run that was killed between its last layer and this line left them
        return 0
    fi
    [ "$START" -gt 0 ] && say "image going on after layer $START of $DEPTH, which is here"
    climb
    if ! whole_image && [ "$START" -gt 0 ] && [ "$KIND" = full ]; then
        # what was here only looked the same (other blobs, or a damaged store): bring everything
        say "image what was here does not fit; loading every layer"
        drop_stairs
        $DOCKER rmi -f "$REF" >/dev/null 2>&1
        START=0
        climb
    fi
    whole_image || die 6 "the engine says that it loaded $REF, but the image has other layers than the plan; its last words: $(tail -c 300 "$WORK/engine" | tr '\n' ' ')" \
        "look at the engine's log and its disk (docker info), then run this again"
    drop_stairs
}

whole_image() { layers_of "$REF" >"$WORK/got" && [ "$(same_prefix "$WORK/want" "$WORK/got")" -eq "$DEPTH" ] && [ "$(wc -l <"$WORK/got")" -eq "$DEPTH" ]; }

climb() {
    local _first _last _files _head _borrows
    TOUCHED=yes
    choose_steps | join_steps >"$WORK/steps"
    while read -r _first _last _files _head _borrows <&7; do
        [ "$_last" -gt "$START" ] || continue
        say "image layers $_first to $_last of $DEPTH"
        if [ "$_borrows" != - ]; then harvest "$_first" "$_last"; fi
        [ "$_head" = - ] || restore "$_head" || die 6 "$_head could not be made of what $PREFIX/kept has" "carry the full bundle of $ID and add --also DIR"
        step_stream "$_files" "$_head" "$_borrows" 2>"$WORK/stream.err"
        # the exit code says little: the containerd store answers 0 for a broken image
        layers_of "$(step_tag "$_last")" >"$WORK/got"
        [ "$(same_prefix "$WORK/want" "$WORK/got")" -ge "$_last" ] || step_failed "$_files"
    done 7<"$WORK/steps"
}

# The steps of the plan; for an update, those whose unchanged layers are no longer here are replaced by parts of the full
# bundle (--also), and the layers below the first step come from there as well when the base was pruned. A line for each:
# FIRST LAST FILES HEAD BORROWS, each of the last three "-" where the archive has no files, no head apart, no layers from here.
choose_steps() {
    local _first _last _files _head _borrows _rest _lowest _gone _diff _layer _state
    _lowest=$((DEPTH + 1))
    rows step >"$WORK/steps.plan"
    while read -r _first _rest; do [ "$_first" -lt "$_lowest" ] && _lowest=$_first; done <"$WORK/steps.plan"
    [ "$START" -ge $((_lowest - 1)) ] || full_steps 1 $((_lowest - 1))
    while read -r _first _last _files _head; do
        _gone='' _borrows=-
        [ "$_head" = - ] || can_restore "$_head" || _gone=yes
        borrowed_rows "$_first" "$_last" >"$WORK/borrowed"
        while read -r _rest _diff _rest _rest _rest _layer _state; do
            _borrows=yes
            if [ "$_state" = reuse ]; then holder_of "$_diff" >/dev/null; else can_restore "layers/$_layer"; fi || _gone=yes
        done <"$WORK/borrowed"
        if [ -n "$_gone" ]; then full_steps "$_first" "$_last"; else echo "$_first $_last $_files $_head $_borrows"; fi
    done <"$WORK/steps.plan"
}

# The containerd store keeps the blobs of what it loads anyway: there several archives at a time need no more room than one, and
# each load takes it a fifth of a second. So neighbours go in together, of this many bytes at most: what a killed run does again.
AT_ONCE=1000000000

join_steps() { # join_steps: of the steps on stdin those that are missing, neighbours joined: "A+B" are the files of A, then of B
    local _first _last _files _how _from='' _to='' _all='' _before='' _sum=0 _bytes
    while read -r _first _last _files _how; do
        [ "$_last" -gt "$START" ] || continue
        _bytes=$(blob_bytes "$_first" "$_last")
        if [ -n "$CONTAINERD" ] && [ "$_before" = "- -" ] && [ "$_how" = "- -" ] && [ $((_sum + _bytes)) -le "$AT_ONCE" ]; then
            _all=$_all+$_files _sum=$((_sum + _bytes))
        else
            [ -z "$_from" ] || echo "$_from $_to $_all $_before"
            _from=$_first _all=$_files _before=$_how _sum=$_bytes
        fi
        _to=$_last
    done
    [ -z "$_from" ] || echo "$_from $_to $_all $_before"
}

blob_bytes() { # blob_bytes FIRST LAST: of the blobs of these layers
    local _n _diff _size _sha _blob _rest _sum=0
    while read -r _n _diff _size _sha _blob _rest; do
        if [ "$_n" -ge "$1" ] && [ "$_n" -le "$2" ]; then _sum=$((_sum + _blob)); fi
    done <"$WORK/layers"
    echo "$_sum"
}

join_parts() { # join_parts FILES+FILES...: archives in a row as one, so each but the last without its end, two empty blocks
    local _left=$1 _p _bytes
    while [ "${_left#*+}" != "$_left" ]; do
        paths_of "${_left%%+*}" >"$WORK/joined" || return 1
        _bytes=-1024
        set --
        while read -r _p; do set -- "$@" "$_p" && _bytes=$((_bytes + $(stat -c %s "$_p"))); done <"$WORK/joined"
        if [ $# = 1 ]; then slice 0 "$_bytes" <"$1"; else cat "$@" | slice 0 "$_bytes"; fi
        _left=${_left#*+}
    done
    join_volumes "$_left"
}

full_steps() { # full_steps FIRST LAST: these layers by the full bundle's own parts
    local _first _last _path
    rows full >"$WORK/full"
    while read -r _first _last _path; do
        [ "$_last" -ge "$1" ] && [ "$_first" -le "$2" ] && [ "$_last" -gt "$START" ] || continue
        echo "$_first $_last $_path - -"
    done <"$WORK/full"
}

# step_tag LAST: what the image is called after the step that ends with this layer.
step_tag() { if [ "$1" -eq "$DEPTH" ]; then echo "$REF"; else printf '%s-%02d\n' "$STAIR" "$1"; fi; }

# Files that are whole load by name, so that the engine reads them itself; joined or mixed ones come through a pipe.
step_stream() { # step_stream FILES HEAD BORROWS
    case $1 in
        *[,+]*) ;;
        *) if [ "$2$3" = -- ]; then $DOCKER load -q -i "$(where "$1")" >"$WORK/engine" 2>&1; return; fi ;;
    esac
    {
        if [ "$3" != - ]; then borrowed; fi
        if [ "$2" != - ]; then cat "$WORK/restored/$2"; fi
        if [ "$1" = - ]; then head -c 1024 /dev/zero; else join_parts "$1"; fi # the end of an archive that carries nothing
    } | $DOCKER load -q >"$WORK/engine" 2>&1
}

step_failed() {
    local _words _what
    _what=$(echo "$1" | tr + ' ')
    [ "$_what" != - ] || _what="what was made of $PREFIX/kept"
    [ "$START" -gt 0 ] && [ "$KIND" = full ] && { START=$((DEPTH + 1)); return; } # load_image tries once more from the bottom
    _words=$(tail -c 300 "$WORK/engine" | tr '\n' ' ')
    case $_words in
        *"no space left"*) die 6 "the engine ran out of disk while it loaded $_what: $_words" "free room in $DATA_ROOT (docker system df shows what takes it), then run this again" ;;
        *) die 6 "the engine did not take $_what, although its hash is right: $_words" "run this again; if it stays, look at the engine's log (journalctl -u docker)" ;;
    esac
}

# --- layers that an update takes from the server itself (overlay2 keeps a layer under all that lie below it, so the ones
# above a changed layer must be given to the engine again: small ones are kept, docker save gives back the others byte for
# byte; the containerd store finds them itself) ------------------------------------------------------------------------------

harvest() { # harvest FIRST LAST: the borrowed layers of this step: rebuilt, or from the images that have them into the spool
    local _n _diff _size _sha _blob _name _state _image
    mkdir -p "$WORK/spool"
    borrowed_rows "$1" "$2" >"$WORK/borrowed"
    : >"$WORK/reuse"
    while read -r _n _diff _size _sha _blob _name _state <&6; do
        if [ "$_state" = rebuilt ]; then
            restore "layers/$_name" || die 6 "layer $_n could not be made of what $PREFIX/kept has" "carry $(full_part "$_n") of the full bundle and add --also DIR"
        elif [ -z "$CONTAINERD" ] && ! kept_file "$_sha" >/dev/null; then echo "$_n $_diff $_size" >>"$WORK/reuse"; fi
    done 6<"$WORK/borrowed"
    : >"$WORK/holders"
    while read -r _n _diff _size; do
        [ -f "$WORK/spool/${_diff#sha256:}" ] && continue
        holder_of "$_diff" >>"$WORK/holders" || die 6 "layer $_n is no longer on the server" "carry $(full_part "$_n") of the full bundle and add --also DIR"
    done <"$WORK/reuse"
    sort -u "$WORK/holders" >"$WORK/holders.u"
    while read -r _image <&9; do
        say "      taking unchanged layers from $_image"
        $DOCKER save "$_image" | pick_layers
    done 9<"$WORK/holders.u"
    while read -r _n _diff _size; do
        [ -f "$WORK/spool/${_diff#sha256:}" ] || die 6 "layer $_n could not be taken from the images here" "carry $(full_part "$_n") of the full bundle and add --also DIR"
    done <"$WORK/reuse"
}

borrowed_rows() { # borrowed_rows FIRST LAST: the rows of the layers that are not in the step's file
    local _n _diff _size _sha _blob _name _state
    while read -r _n _diff _size _sha _blob _name _state; do
        case $_state in reuse | rebuilt) ;; *) continue ;; esac
        [ "$_n" -ge "$1" ] && [ "$_n" -le "$2" ] && echo "$_n $_diff $_size $_sha $_blob $_name $_state"
    done <"$WORK/layers"
}

# Reads the archive of docker save from stdin and keeps the members that are wanted layers: of the right size, then hash.
pick_layers() {
    local _member _octal _bytes _room _wanted _n _diff _size _hash
    while dd bs=512 count=1 iflag=fullblock of="$WORK/header" 2>/dev/null && [ -s "$WORK/header" ]; do
        _member=$(head -c 100 "$WORK/header" | tr -d '\0')
        if [ -z "$_member" ]; then
            cat >/dev/null
            return
        fi
        _octal=$(dd if="$WORK/header" bs=1 skip=124 count=11 2>/dev/null | tr -cd 0-7)
        _bytes=$((0$_octal))
        _room=$(((_bytes + 511) / 512 * 512))
        _wanted=
        while read -r _n _diff _size; do [ "$_size" = "$_bytes" ] && _wanted=yes; done <"$WORK/reuse"
        if [ -n "$_wanted" ]; then
            dd bs=1048576 count="$_room" iflag=fullblock,count_bytes of="$WORK/spool/member" 2>/dev/null
            _hash=$(sum_of_stdin <"$WORK/spool/member")
            while read -r _n _diff _size; do
                if [ "sha256:$_hash" = "$_diff" ]; then mv "$WORK/spool/member" "$WORK/spool/$_hash"; fi
            done <"$WORK/reuse"
            rm -f "$WORK/spool/member"
        elif [ "$_room" -gt 0 ]; then
            dd bs=1048576 count="$_room" iflag=fullblock,count_bytes of=/dev/null 2>/dev/null
        fi
    done
}

borrowed() { # the borrowed layers as members of the archive, under the name that its manifests expect; the engine inflates or not
    local _n _diff _size _sha _blob _name _state _file
    while read -r _n _diff _size _sha _blob _name _state <&6; do
        _file=$WORK/spool/${_diff#sha256:}
        if [ "$_state" = rebuilt ]; then member "$_sha" "$WORK/restored/layers/$_name" "$_blob"
        elif [ -n "$CONTAINERD" ]; then :
        elif [ -f "$_file" ]; then member "$_sha" "$_file" "$_size"
        else member "$_sha" "$(kept_file "$_sha")" "$_blob"; fi
    done 6<"$WORK/borrowed"
}

member() { # member HEX FILE BYTES: one member of a tar, filled up to whole blocks
    tar_header "blobs/sha256/$1" "$3"
    cat "$2"
    head -c $(((512 - $3 % 512) % 512)) /dev/zero
}

tar_header() { # tar_header blobs/sha256/HEX BYTES: the 512 bytes before a plain file of mode 644 and owner 0
    local _size _rest _first _sum
    _size=$(printf %011o "$2")
    _sum=3574 # of all bytes but those of HEX and the size, the sum itself as spaces
    _rest=${1##*/}$_size
    while [ -n "$_rest" ]; do
        _first=${_rest%"${_rest#?}"}
        case $_first in
            a) _sum=$((_sum + 97)) ;;
            b) _sum=$((_sum + 98)) ;;
            c) _sum=$((_sum + 99)) ;;
            d) _sum=$((_sum + 100)) ;;
            e) _sum=$((_sum + 101)) ;;
            f) _sum=$((_sum + 102)) ;;
            *) _sum=$((_sum + 48 + _first)) ;;
        esac
        _rest=${_rest#?}
    done
    printf %s "$1"
    head -c $((100 - ${#1})) /dev/zero
    printf '0000644\0000000000\0000000000\000%s\00000000000000\000%06o\000 0' "$_size" "$_sum"
    head -c 100 /dev/zero
    printf 'ustar  '
    head -c 248 /dev/zero
}

drop_stairs() {
    local _image
    $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}' >"$WORK/stairs" 2>/dev/null
    set --
    while read -r _image; do
        case $_image in "$STAIR"-*) set -- "$@" "$_image" ;; esac
    done <"$WORK/stairs"
    [ $# = 0 ] || $DOCKER rmi "$@" >/dev/null 2>&1 # one command: each takes a while to start
}

# After a refusal: nothing of this run stays, what was there before is untouched.
undo() {
    local _s
    TOUCHED=
    drop_stairs
    [ -n "$REF_BEFORE" ] || $DOCKER rmi -f "$REF" >/dev/null 2>&1
    for _s in $STAGES; do
        chmod -R u+w "$_s" 2>/dev/null
        rm -rf "$_s"
    done
}
