
# --- preflight: measured, needed, verdict, remedy --------------------------------------------------------------------------

check() { # check NAME ok|warn|fail MEASURED NEEDED REMEDY
    printf '%s\n%s\n%s\n%s\n%s\n' "$1" "$2" "$3" "$4" "$5" >>"$WORK/checks"
}

# Two facts of a file system by df: kilobytes (or inodes) free, and where it is mounted.
df_free() { # df_free PATH [-i]
    df -P ${2:--k} "$1" 2>/dev/null | {
        read -r _
        read -r _ _ _ _free _ _mount
        echo "${_free:-?} ${_mount:-?}"
    }
}

layers_of() { # layers_of IMAGE: its DiffIDs, one a line; the same on either store
    local _l
    $DOCKER image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" 2>/dev/null | while read -r _l; do
        if [ -n "$_l" ]; then echo "$_l"; fi
    done
}

# Images that may hold layers of ours: everything under our name, and everything that carries our label.
candidates() {
    {
        $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}' 2>/dev/null
        $DOCKER images --filter label=milktea.wire --format '{{.Repository}}:{{.Tag}}' 2>/dev/null
    } | sort -u
}

# What the engine has already: START layers from the bottom on in one image, and files "have" (all DiffIDs) and "from".
take_stock() {
    local _image _k _l
    START=0 START_IMAGE=''
    : >"$WORK/have"
    candidates >"$WORK/candidates"
    while read -r _image; do
        layers_of "$_image" >"$WORK/layers.of" || continue
        _k=$(same_prefix "$WORK/want" "$WORK/layers.of")
        while read -r _l; do echo "$_l $_image"; done <"$WORK/layers.of" >>"$WORK/have"
        if [ "$_k" -gt "$START" ]; then START=$_k START_IMAGE=$_image; fi
    done <"$WORK/candidates"
}

holder_of() { # holder_of DIFFID: an image that has this layer
    local _l _image
    while read -r _l _image; do
        [ "$_l" = "$1" ] && { echo "$_image"; return 0; }
    done <"$WORK/have"
    return 1
}

# Bytes that loading adds: layers that are missing, the largest of their archives while it is unpacked, and on the
# containerd store the compressed blobs, which stay beside the unpacked files.
bytes_to_load() {
    local _sum _peak _part _n _last _k _diff _size _sha _blob _name _state _rest
    _sum=0 _peak=0
    while read -r _n _diff _size _sha _blob _rest; do
        [ "$_n" -gt "$START" ] || continue
        _sum=$((_sum + _size))
        [ -n "$CONTAINERD" ] && _sum=$((_sum + _blob))
    done <"$WORK/layers"
    rows step >"$WORK/steps.plan"
    while read -r _n _last _rest; do
        _part=0
        while read -r _k _diff _size _sha _blob _name _state; do
            [ "$_k" -ge "$_n" ] && [ "$_k" -le "$_last" ] || continue
            # a layer given back to the engine lies in the spool and in the engine's own copy of the archive
            if [ "$_state" = reuse ] && [ -z "$CONTAINERD" ] && ! kept_file "$_sha" >/dev/null; then _part=$((_part + 2 * _size)); else _part=$((_part + _blob)); fi
        done <"$WORK/layers"
        [ "$_last" -gt "$START" ] && [ "$_part" -gt "$_peak" ] && _peak=$_part
    done <"$WORK/steps.plan"
    echo $((_sum + _peak))
}

# What comes to lie in PREFIX: the models that are not there yet, and what is kept for the next update.
bytes_of_prefix() {
    local _sum _set _bytes _rest
    _sum=0
    [ -n "$MODELS" ] && rows model >"$WORK/models" && while read -r _set _bytes _rest; do
        [ -d "$PREFIX/models/$_set" ] || _sum=$((_sum + _bytes))
    done <"$WORK/models"
    rows keep >"$WORK/keep"
    while read -r _set _bytes _rest; do
        kept_file "$_set" >/dev/null || _sum=$((_sum + _bytes))
    done <"$WORK/keep"
    echo "$_sum"
}

preflight() {
    local _name _verdict _m _n _r
    : >"$WORK/checks"
    ENGINE='' CONTAINERD='' DATA_ROOT='' START=0 START_IMAGE=''
    : >"$WORK/have"
    check_platform
    check_engine
    check_bundle
    if [ -n "$ENGINE" ]; then
        take_stock
        check_base
        check_disk
    fi
    check_prefix
    check_memory
    check_gpus
    FAILED=0 WARNED=0
    while read -r _name && read -r _verdict && read -r _m && read -r _n && read -r _r; do
        case $_verdict in fail) FAILED=$((FAILED + 1)) ;; warn) WARNED=$((WARNED + 1)) ;; esac
    done <"$WORK/checks"
}

check_platform() {
    local _is _needs
    _is=$(uname -m) _needs=$(plan platform)
    case $_is in x86_64) _is=amd64 ;; aarch64) _is=arm64 ;; esac
    if [ "$_is" = "$_needs" ]; then check platform ok "$_is" "$_needs" "nothing to do"
    else check platform fail "$_is" "$_needs" "carry a bundle for $_is"; fi
}

check_engine() {
    local _why
    if ! has "${DOCKER%% *}"; then
        check engine fail "no docker command" "Docker 20.10 or newer" "install Docker Engine from this server's own package source"
        return
    fi
    if ! ENGINE=$($DOCKER version --format '{{.Server.Version}}' 2>"$WORK/err"); then
        ENGINE=''
        _why=$(head -c 200 "$WORK/err" | tr '\n' ' ')
        case $_why in
            *ermission*) check engine fail "no permission for the engine's socket" "access to Docker" "run this as root, or: usermod -aG docker $(id -un) and log in again" ;;
            *) check engine fail "the engine does not answer: $_why" "a running Docker engine" "systemctl start docker, then run this again" ;;
        esac
        return
    fi
    if not_below "$ENGINE" 20.10; then check engine ok "Docker $ENGINE" "20.10 or newer" "nothing to do"
    else check engine fail "Docker $ENGINE" "20.10 or newer" "update Docker Engine to 20.10 or newer"; fi
    case $($DOCKER info --format '{{json .DriverStatus}}' 2>/dev/null) in *containerd.snapshotter*) CONTAINERD=yes ;; esac
    if [ -n "$CONTAINERD" ]; then check store ok "containerd" "either store" "nothing to do; its exit codes are not trusted, the image is inspected instead"
    else check store ok "$($DOCKER info --format '{{.Driver}}' 2>/dev/null)" "either store" "nothing to do"; fi
    DATA_ROOT=$($DOCKER info --format '{{.DockerRootDir}}' 2>/dev/null)
    [ -n "$CONTAINERD" ] && [ -d "$HOST/var/lib/containerd" ] && not_below "$ENGINE" 29 && DATA_ROOT=/var/lib/containerd
    check_toolkit
}

check_toolkit() {
    local _cdi
    [ "$CUDA" = none ] && return
    case $($DOCKER info --format '{{json .Runtimes}}' 2>/dev/null) in
        *nvidia*) check toolkit ok "runtime nvidia" "NVIDIA container toolkit or CDI" "nothing to do"; return ;;
    esac
    for _cdi in "$HOST"/etc/cdi/*nvidia* "$HOST"/var/run/cdi/*nvidia*; do
        [ -f "$_cdi" ] && { check toolkit ok "CDI $_cdi" "NVIDIA container toolkit or CDI" "nothing to do"; return; }
    done
    check toolkit fail "neither runtime nor CDI" "NVIDIA container toolkit or CDI" \
        "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
}

# Sizes only: a missing or half-copied volume is named before anything else happens.
check_bundle() {
    local _bad _v _bytes _sha _group _at _is _n
    _bad=
    while read -r _v _bytes _sha _group; do
        _at=$(where "$_v") || { _bad="$_bad $_v (missing)"; continue; }
        _is=$(stat -c %s "$_at" 2>/dev/null || echo 0)
        [ "$_is" = "$_bytes" ] || _bad="$_bad $_v ($_is of $_bytes bytes)"
    done <<ROWS
$(rows vol)
ROWS
    _n=$(rows vol | wc -l)
    if [ -z "$_bad" ]; then check bundle ok "$((_n)) volumes, all there" "$((_n)) volumes" "nothing to do"
    else check bundle warn "wrong:$_bad" "$((_n)) whole volumes" "copy these again, or let parity rebuild them: sh INSTALL.sh repair"; fi
}

# For an update: which layers must come from what is on the server, and are they there?
check_base() {
    local _missing _n _last _files _rest
    [ "$KIND" = delta ] || return 0
    _missing=''
    absent_papers >"$WORK/absent"
    while read -r _n; do can_restore "$_n" || _missing="$_missing $_n"; done <"$WORK/absent"
    choose_steps >"$WORK/steps"
    # what choose_steps could only find in the full bundle must be there
    while read -r _n _last _files _rest; do
        [ "$_files" = - ] || is_carried "$_files" || where "$_files" >/dev/null || _missing="$_missing $_files"
    done <"$WORK/steps"
    if [ -z "$_missing" ]; then check base ok "the layers that this update builds on are here" "$(plan since)" "nothing to do"
    else check base fail "pruned or never installed: $(plan since)" "its layers" "carry the full bundle of $ID, or only these files of it, and add --also DIR:$_missing"; fi
}

is_carried() { # is_carried FILES: they are volumes of this bundle
    local _v _rest _first=${1%%,*}
    rows vol >"$WORK/vols"
    while read -r _v _rest; do [ "$_v" = "$_first" ] && return 0; done <"$WORK/vols"
    return 1
}

full_part() { # full_part N: what the full bundle calls the archive with layer N
    local _first _last _path
    rows full | while read -r _first _last _path; do
        if [ "$_first" -le "$1" ] && [ "$_last" -ge "$1" ]; then echo "$_path"; fi
    done
}

check_disk() {
    local _load _models _free _mount _pfree _pmount _files
    _load=$(bytes_to_load) _models=$(bytes_of_prefix)
    set -- $(df_free "$(existing "$HOST$DATA_ROOT")")
    _free=$1 _mount=$2
    set -- $(df_free "$(existing "$PREFIX")")
    _pfree=$1 _pmount=$2
    [ "$_mount" = "$_pmount" ] && _load=$((_load + _models)) _models=0
    room "disk of the engine" "$DATA_ROOT" "$_free" "$_load" "the layers that are missing, and the largest part while it is unpacked"
    [ "$_models" -gt 0 ] && room "disk of the folder" "$PREFIX" "$_pfree" "$_models" "the base models, and what the next update builds on"
    set -- $(df_free "$(existing "$HOST$DATA_ROOT")" -i)
    _files=$(plan files || echo 0)
    case $1 in *[!0-9]* | '' | 0) return 0 ;; esac # btrfs and overlay count none
    [ "$START" -ge "$DEPTH" ] && _files=0
    if [ "$1" -gt "$_files" ]; then check inodes ok "$1 free" "$_files" "nothing to do"
    else check inodes fail "$1 free" "$_files" "free inodes under $DATA_ROOT: docker system prune removes what no container uses"; fi
}

room() { # room NAME PATH FREE_KB BYTES WHAT_FOR
    local _have
    case $3 in
        *[!0-9]* | '') check "$1" warn "cannot be seen from here: $2" "$(human "$4")" "make sure that $2 has $(human "$4") free: $5"; return ;;
    esac
    _have=$(($3 * 1024))
    if [ "$_have" -ge "$4" ]; then check "$1" ok "$(human "$_have") free in $2" "$(human "$4")" "nothing to do"
    else check "$1" fail "$(human "$_have") free in $2" "$(human "$4"): $5" "free $(human $(($4 - _have))) there: docker system prune removes what no container uses"; fi
}

check_prefix() {
    local _at
    _at=$(existing "$PREFIX")
    if [ -w "$_at" ]; then check folder ok "$PREFIX" "a folder to write to" "nothing to do"
    else check folder fail "$_at cannot be written to by $(id -un)" "a folder to write to" "run this as root, or choose another: --prefix DIR"; fi
}

check_memory() {
    local _kb _key _value _rest _need
    _kb=0
    while read -r _key _value _rest; do
        [ "$_key" = MemTotal: ] && _kb=$_value
    done <"$HOST/proc/meminfo"
    _need=$(plan memory_bytes || echo 0)
    if [ $((_kb * 1024)) -ge "$_need" ]; then check memory ok "$(human $((_kb * 1024)))" "$(human "$_need")" "nothing to do"
    else check memory warn "$(human $((_kb * 1024)))" "$(human "$_need")" "training may be killed for memory: close other programs, or take a smaller base model"; fi
    # milktea-run gives its containers half of the memory as /dev/shm; several GPUs talk through it
    if [ $((_kb / 2)) -ge 1048576 ]; then check shm ok "$(human $((_kb * 512))) for containers" "1 GB" "nothing to do"
    else check shm warn "$(human $((_kb * 512))) for containers" "1 GB" "train on one GPU: processes of several GPUs exchange data through /dev/shm"; fi
    [ -e "$HOST/sys/fs/selinux/enforce" ] && check selinux ok "on" "any" "nothing to do: milktea-run labels its mounts"
    return 0
}

# "NAME, DRIVER, CAPABILITY, MEMORY" of each GPU by nvidia-smi; without it the driver alone by the kernel.
list_gpus() {
    local _line _w
    if has nvidia-smi; then
        nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>/dev/null && return
    fi
    [ -r "$HOST/proc/driver/nvidia/version" ] || return 0
    while read -r _line; do
        case $_line in NVRM*) for _w in $_line; do case $_w in [0-9]*.[0-9]*) echo "unknown GPU, $_w, ?, ?"; return ;; esac; done ;; esac
    done <"$HOST/proc/driver/nvidia/version"
}

check_gpus() {
    local _native _floor _compat _g _name _driver _cap _memory _class _v _do _level
    list_gpus >"$WORK/gpus"
    if [ "$CUDA" = none ]; then
        check driver ok "not needed" "none: this image trains on the CPU" "nothing to do"
        return
    fi
    set -- $(rows_of_line)
    _native=$1 _floor=$2 PLAN_ARCHES=$3 PLAN_PTX=$4 _compat=$5
    if [ ! -s "$WORK/gpus" ]; then
        check driver fail "no NVIDIA driver" "$_floor or newer for CUDA $CUDA" "install the NVIDIA driver $_floor or newer from this server's own package source"
        return
    fi
    _g=0
    while IFS=, read -r _name _driver _cap _memory; do
        _driver=${_driver# } _cap=${_cap# }
        if [ "$_cap" = '?' ]; then
            if not_below "$_driver" "$_floor"; then check driver ok "$_driver" "$_floor or newer for CUDA $CUDA" "nothing to do; GPU unknown without nvidia-smi"
            else check driver fail "$_driver" "$_floor or newer for CUDA $CUDA" "update the driver to $_floor or newer"; fi
            continue
        fi
        _class=$(class_of "$_name")
        _v=$(verdict "$_driver" "$_cap" "$_class" "$CUDA" "$_native" "$_floor" "$PLAN_ARCHES" "$PLAN_PTX" "$_compat")
        _do=$(remedy "$_v" "$_driver" "$_cap" "$_class" "$CUDA" "$_native" "$_floor")
        case $_v in native | minor) _level=ok ;; ptx) _level=warn ;; *) _level=fail ;; esac
        check "gpu $_g" $_level "$_name, compute capability $_cap, driver $_driver: $_v" \
            "driver $_floor or newer for CUDA $CUDA, one of $PLAN_ARCHES" "$_do"
        _g=$((_g + 1))
    done <"$WORK/gpus"
}

rows_of_line() { # the numbers of this bundle's own line
    local _own _line _cuda _rest
    _own=$(plan line_name)
    rows line | while read -r _line _cuda _rest; do [ "$_line" = "$_own" ] && echo "$_rest"; done
}

print_checks() {
    local _name _verdict _m _n _r
    while read -r _name && read -r _verdict && read -r _m && read -r _n && read -r _r; do
        say "$(printf '%-5s %-20s %s (needs %s)' "$_verdict" "$_name" "$_m" "$_n")"
        [ "$_verdict" = ok ] || say "        do this: $_r"
    done <"$WORK/checks"
}

# The facts and checks as one JSON object. Carried home, it lets the next bundle hold only what this server lacks.
json_preflight() {
    local _sep _name _driver _cap _memory _image _l _holder _d _verdict _m _n _r
    printf '{"milktea_preflight":1,"server":%s,"engine":%s,"store":%s,"kernel":%s,"bundle":%s,\n"gpus":[' \
        "$(json_str "$(uname -n)")" "$(json_str "$ENGINE")" "$(json_str "${CONTAINERD:+containerd}")" "$(json_str "$(uname -r)")" "$(json_str "$NAME $ID")"
    _sep=
    while IFS=, read -r _name _driver _cap _memory; do
        printf '%s{"name":%s,"driver":%s,"capability":%s,"memory":%s}' "$_sep" "$(json_str "$_name")" "$(json_str "${_driver# }")" "$(json_str "${_cap# }")" "$(json_str "${_memory# }")"
        _sep=,
    done <"$WORK/gpus"
    printf '],\n"images":['
    _sep=
    [ -f "$WORK/candidates" ] || : >"$WORK/candidates"
    while read -r _image; do
        printf '%s\n{"ref":%s,"layers":[' "$_sep" "$(json_str "$_image")"
        _sep=''
        while read -r _l _holder; do
            [ "$_holder" = "$_image" ] || continue
            printf '%s"%s"' "$_sep" "$_l"
            _sep=,
        done <"$WORK/have"
        printf ']}'
        _sep=,
    done <"$WORK/candidates"
    printf '],\n"models":['
    _sep=
    for _d in "$PREFIX"/models/*; do
        [ -f "$_d/.sha256" ] || continue
        printf '%s"sha256:%s"' "$_sep" "${_d##*/}"
        _sep=,
    done
    printf '],\n"kept":['
    _sep=
    for _d in "$PREFIX"/kept/*/*/*; do
        case ${_d##*/} in *[!0-9a-f]*) continue ;; esac
        printf '%s"%s"' "$_sep" "${_d##*/}"
        _sep=,
    done
    printf '],\n"checks":['
    _sep=
    while read -r _name && read -r _verdict && read -r _m && read -r _n && read -r _r; do
        printf '%s\n{"check":%s,"verdict":"%s","measured":%s,"needed":%s,"remedy":%s}' "$_sep" "$(json_str "$_name")" "$_verdict" \
            "$(json_str "$_m")" "$(json_str "$_n")" "$(json_str "$_r")"
        _sep=,
    done <"$WORK/checks"
    printf ']}\n'
}
