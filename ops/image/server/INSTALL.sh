#!/bin/sh
# Brings the milktea bundle in this folder onto a server without a network, proves it, and can take it back.
# Needs sh (dash, busybox ash or bash), docker or podman, coreutils, and ssh-keygen or openssl for the sender's signature. Killed
# anywhere and started again, it finishes. What comes after the image is verified is Python inside it: tools/installer.py.
# shellcheck shell=dash
{ set -u # read to its last line before anything runs: a shortened script is a syntax error
export LC_ALL=C
umask 022

usage() {
    cat <<'TEXT'
usage: sh INSTALL.sh [COMMAND] [OPTIONS]
  install      check the server, verify every volume, load, prove, and make it the current one (the default)
  preflight    only check the server: what was measured, what is needed, what to do     (changes nothing)
  verify       only check the signature and every file of the bundle                    (changes nothing)
  rollback     make the previous image the current one again
options:
  --key KEY         the sender's key, received by another way than this disk: a file (.pub or .pem) or SHA256:...
  --new-sender      the key given by --key replaces the one that this server knows
  --require-signature   stop when the signature cannot be checked here
  --allow-older     take a bundle with a smaller release number than the one installed
  --prefix DIR      where models, tools and records go (/opt/milktea for root, else $HOME/milktea)
  --also DIR        look for volumes in DIR as well: other disks (may be repeated)
  --gpus LIST       prove on these GPUs only: 0,1 or the UUIDs of MIG devices (nvidia-smi -L); none: a server without
  --facts           preflight writes facts for the sender on stdout: carry them home for a smaller next bundle
  --no-models       leave the base models out
  --force           go on although preflight says no (the record keeps what it said)
exit: 0 done  2 wrong use  3 the server is not ready  4 a file is missing or damaged  5 wrong signature
      6 the engine did not load it  7 the image did not prove itself  8 busy; 3 to 7 leave the server as it was
TEXT
}

BUNDLE=$(cd "$(dirname "$0")" && pwd) || exit 2
COMMAND=install PREFIX='' KEY='' NEW_SENDER='' FACTS='' FORCE='' MODELS=yes NEED_SIGNATURE='' OLDER='' ALSO='' GPUS=all
if [ "$(id -u)" = 0 ]; then PREFIX=/opt/milktea; else PREFIX=${HOME:-/var/tmp}/milktea; fi
# Where the server's own files are seen from, for a rescue shell that has the server mounted elsewhere.
HOST=${MILKTEA_HOST_ROOT:-}
WORK='' LOCKED='' TOUCHED='' SMALL='' ID_BEFORE='' PATIENCE=${MILKTEA_PATIENCE_S:-60}

has() { command -v "$1" >/dev/null 2>&1; }
DOCKER=${DOCKER:-$(if has docker || ! has podman; then echo docker; else echo podman; fi)}
say() { printf '%s\n' "$*" >&3; }

# die CODE WHAT REMEDY: the three parts of every refusal: what happened, how the server is now, what to type next.
die() {
    [ -z "$TOUCHED" ] || undo
    printf 'REFUSED: %s\n  server:  as it was before\n  do this: %s\n' "$2" "$3" >&2
    exit "$1"
}

human() { if [ "$1" -ge 10000000 ]; then echo "$(($1 / 1000000)) MB"; else echo "$(($1 / 1000)) KB"; fi; } # human BYTES
not_below() { [ "$(printf '%s\n' "$1.0" "$2" | sort -V | head -n 1)" = "$2" ]; } # not_below A B: version A is at least B
existing() { if [ -d "$1" ]; then echo "$1"; else existing "$(dirname "$1")"; fi; } # the nearest folder of a path
one_line() { head -c "${2:-300}" "$1" 2>/dev/null | tr '\n' ' ' | tr -d '\000-\037\177'; } # one_line FILE [BYTES]

# soon FILE COMMAND...: what a program says, into FILE; fails, with a word in FILE, where it fails, says nothing, or hangs
soon() {
    local _file=$1 _rc; shift
    _rc=$({ { timeout -k 5 "$PATIENCE" "$@" </dev/null 4>&-; echo $? >&4; } 2>&1 | head -c 99999 >"$_file"; } 4>&1)
    [ "$_rc" != 124 ] || echo "no answer within $PATIENCE s" >>"$_file"
    [ -s "$_file" ] || { echo "not a word, exit code $_rc" >"$_file"; return 1; }
    return "$_rc"
}

# --- the small files: copied first, verified as copies, and only the copies are used ---------------------------------------

field() { # field FILE KEY: the rest of the first line that begins with KEY
    local _k _rest
    while read -r _k _rest; do [ "$_k" != "$2" ] || { echo "$_rest"; return 0; }; done 2>/dev/null <"$1"
    return 1
}
plan() { field "$SMALL/PLAN" "$1"; }

rows() { # rows KEY: the rest of every line of PLAN that begins with KEY
    local _k _rest
    while read -r _k _rest; do [ "$_k" != "$1" ] || echo "$_rest"; done <"$SMALL/PLAN"
}

fits() { # fits TEXT CHARACTERS: not empty, of these characters alone, no path that leaves its folder
    case $1 in '' | *[!$2]* | -* | .* | */../* | */.. | /*) return 1 ;; esac
}

copy_small() {
    local _sha _path
    SMALL=$WORK/small; mkdir -p "$SMALL"
    # only the head of a signature: ssh-keygen takes hours over a file as large as a layer
    for _path in SHA256SUMS.sig SHA256SUMS.openssl; do [ ! -f "$BUNDLE/$_path" ] || head -c 9999 "$BUNDLE/$_path" >"$SMALL/$_path"; done
    [ ! -f "$SMALL/SHA256SUMS.sig" ] || case $(tr '\n\000' ',!' <"$SMALL/SHA256SUMS.sig") in # ssh-keygen overlooks what stands beside it
        *[!A-Za-z0-9+/=,\ -]*) false ;; "-----BEGIN SSH SIGNATURE-----,U1NIU0lHAAAAAQ"*",-----END SSH SIGNATURE-----,") ;; *) false ;;
    esac || die 5 "wrong signature: SHA256SUMS.sig is damaged" "copy SHA256SUMS.sig from the sender's disk again"
    cp "$BUNDLE/SHA256SUMS" "$SMALL" 2>/dev/null || die 4 "$BUNDLE/SHA256SUMS is missing: this is not a whole bundle" "copy SHA256SUMS from the sender's disk again"
    while read -r _sha _path; do
        fits "$_sha" 0-9a-f && [ ${#_sha} = 64 ] && fits "$_path" 'A-Za-z0-9._/+-' ||
            die 4 "SHA256SUMS is damaged: one of its lines is not a hash and a path" "copy SHA256SUMS from the sender's disk again"
        case $_path in parts/* | models/*) continue ;; esac
        [ -f "$BUNDLE/$_path" ] || die 4 "$_path is missing (or SHA256SUMS is damaged)" "copy $_path and SHA256SUMS from the sender's disk again"
        mkdir -p "$SMALL/$(dirname "$_path")"
        cp "$BUNDLE/$_path" "$SMALL/$_path" || die 4 "$_path cannot be read" "copy $_path from the sender's disk again"
        [ "$(sum_of <"$SMALL/$_path")" = "$_sha" ] || die 4 "$_path is damaged, or belongs to another bundle" "copy $_path from the sender's disk again"
    done <"$SMALL/SHA256SUMS"
    for _path in PLAN INSTALL.sh; do [ -f "$SMALL/$_path" ] || die 4 "SHA256SUMS is damaged: $_path is not in it" "copy SHA256SUMS from the sender's disk again"; done
}

read_plan() {
    local _n _diff _rest _v
    for _v in $(rows signature); do [ -f "$SMALL/$_v" ] || die 4 "$_v is missing" "copy $_v from the sender's disk again"; done
    [ "$(plan milktea-bundle)" = 5 ] || die 4 "PLAN is of another milktea than this INSTALL.sh" "copy the whole bundle again"
    NAME=$(plan name) ID=$(plan id) KIND=$(plan kind) RELEASE=$(plan release) REF=$(plan ref) REPO=${REF%:*} CUDA=$(plan cuda)
    STEPS=$(plan intermediate) CONFIG=$(plan config) MANIFEST=$(plan manifest)
    fits "$NAME" a-z0-9.- && fits "$ID" 0-9a-f && fits "$RELEASE" 0-9 && fits "$REF" 'a-z0-9._/:-' && fits "$STEPS" 'a-z0-9._/:-' ||
        die 4 "PLAN is damaged: a name in it is none" "do not install it; ask the sender"
    [ "$REF" = "$REPO:$ID" ] && [ "${STEPS%:*}" = "$REPO" ] && [ "${REPO##*/}" = "$NAME" ] ||
        die 4 "PLAN is damaged: its names do not belong together" "do not install it; ask the sender"
    { rows vol; rows model; } | while read -r _v _rest; do fits "$_v" 'A-Za-z0-9._/+-' || exit 1; done ||
        die 4 "PLAN is damaged: a path in it leaves the bundle" "do not install it; ask the sender"
    if [ "$KIND" = models ]; then # the image that is installed here brings them in
        REF=$(field "$PREFIX/state/$(cat "$PREFIX/state/default" 2>/dev/null)" current) || [ $COMMAND != install ] ||
            die 3 "this bundle holds base models alone, and no image is installed in $PREFIX" "install the bundle of an image first, or give its --prefix"
    fi
    rows layer | while read -r _n _diff _rest; do echo "$_diff"; done >"$WORK/want"
    DEPTH=$(($(wc -l <"$WORK/want")))
}

# --- the signature: a given or a known key accepts nothing but "good" ------------------------------------------------------

FINGERPRINT='' PEM='' # the sender's key as it is trusted here: what ssh-keygen prints of it, and a file for openssl

# What --key says, else what the first install here wrote down.
trusted_key() {
    local _known _pem=$PREFIX/keys/sender.pem
    _known=$(cat "$PREFIX/keys/sender" 2>/dev/null)
    [ -f "$_pem" ] || _pem=
    TRUST="with the key that this server knows"
    if [ -n "$KEY" ]; then
        TRUST="with the key given by --key"
        read_key
        [ -z "$NEW_SENDER" ] || return 0
        if [ -n "$_known" ] && [ -n "$FINGERPRINT" ] && [ "$_known" != "$FINGERPRINT" ] ||
            { [ -n "$_pem" ] && [ -n "$PEM" ] && [ "$(sum_of <"$PEM")" != "$(sum_of <"$_pem")" ]; }; then
            die 5 "this server knows another sender ($_known) than --key says" "ask the sender whether the key changed; only if they say so by another way than this disk, add --new-sender"
        fi
    fi
    # what is known and is not given must hold as well
    FINGERPRINT=${FINGERPRINT:-$_known} PEM=${PEM:-$_pem}
}

read_key() { # --key into FINGERPRINT or PEM. A key on the carried disk is no key received another way
    local _file
    case $KEY in SHA256:*) FINGERPRINT=$KEY; return ;; esac
    case $(cd "$(dirname "$KEY")" && pwd)/ in "$BUNDLE"/*) die 5 "--key $KEY lies on the disk that it is to vouch for" "get the sender's key by another way than this disk" ;; esac
    for _file in "$BUNDLE"/* "$BUNDLE"/*/*; do
        [ ! -f "$_file" ] || [ "$(stat -c %s "$_file")" != "$(stat -L -c %s "$KEY")" ] || [ "$(sum_of <"$_file")" != "$(sum_of <"$KEY")" ] ||
            die 5 "--key $KEY is the file ${_file#"$BUNDLE"/} of the disk that it is to vouch for" "get the sender's key by another way than this disk"
    done
    if [ "$(head -c 10 "$KEY")" = "-----BEGIN" ]; then PEM=$KEY; return; fi
    has ssh-keygen || die 5 "ssh-keygen is not here to read $KEY" "ask the sender for the key as .pem, for openssl"
    FINGERPRINT=$(ssh-keygen -l -f "$KEY" 2>/dev/null | { read -r _ _file _ && echo "$_file"; })
    [ -n "$FINGERPRINT" ] || die 2 "--key $KEY is not a public key" "give the sender's .pub or .pem file, or SHA256:..."
}

by_openssl() { openssl dgst -sha256 -verify "$PEM" -signature "$1" "$SMALL/SHA256SUMS" >/dev/null 2>&1; } # by_openssl SIGNATURE
check_signature() {
    local _sums=$SMALL/SHA256SUMS _said _by
    trusted_key
    SIGNED=$([ -f "$_sums.sig" ] || [ -f "$_sums.openssl" ] || echo "not signed") SIGNER=''
    if has ssh-keygen && [ -f "$_sums.sig" ] && ! ssh-keygen -Y sign 2>&1 | head -c 400 | { read -r _said; [ "${_said#*unknown option}" = "$_said" ]; }; then :
    elif has ssh-keygen && [ -f "$_sums.sig" ]; then
        ssh-keygen -Y check-novalidate -n milktea-bundle -s "$_sums.sig" <"$_sums" >"$WORK/signature" 2>&1 ||
            die 5 "wrong signature: SHA256SUMS.sig is not of this SHA256SUMS: $(one_line "$WORK/signature" 120)" "do not install it; copy SHA256SUMS and SHA256SUMS.sig again, or ask the sender"
        _said=$(cat "$WORK/signature")
        SIGNER=SHA256:${_said##*SHA256:} SIGNER=${SIGNER%%[!A-Za-z0-9:+/]*}
        if [ -n "$FINGERPRINT" ]; then
            [ "$SIGNER" = "$FINGERPRINT" ] || die 5 "wrong signature: signed by $SIGNER, and trusted here is $FINGERPRINT ($TRUST)" \
                "do not install it; ask the sender whether the key changed, and give the new one with --key only if they say so by another way than this disk"
            SIGNED="good, by ssh-keygen, $TRUST"
        elif [ -z "$PEM" ]; then SIGNED="of $SIGNER, a key not compared with anything"
        fi
    fi
    if [ -n "$PEM" ] && has openssl && [ -f "$_sums.openssl" ]; then
        head -c $(($(stat -c %s "$_sums.openssl") - 1)) "$_sums.openssl" >"$WORK/signature" # openssl overlooks what stands behind
        by_openssl "$_sums.openssl" && ! by_openssl "$WORK/signature" ||
            die 5 "wrong signature: SHA256SUMS.openssl is damaged, or was not made by the key that is trusted here ($TRUST)" "do not install it; ask the sender by another way than this disk"
        SIGNED="good, by openssl${SIGNED:+ and ssh-keygen}, $TRUST"
    fi
    [ -n "$SIGNED" ] || SIGNED="not checked: no tool here for the key and the signature that there are"
    case $SIGNED in good*) return ;; esac
    [ -z "$NEED_SIGNATURE$FINGERPRINT$PEM" ] ||
        die 5 "the signature is $SIGNED" "ask the sender for a signed bundle and the key that fits this server's tools (ssh-keygen: .pub, openssl: .pem)"
    say "note  signature $SIGNED. Compare this with what the sender told you: SHA256SUMS is $(sum_of <"$_sums")"
}

pin_sender() {
    mkdir -p "$PREFIX/keys"
    case $SIGNED in good* | of*) ;; *) return 0 ;; esac
    if [ -n "$SIGNER" ] && { [ -n "$NEW_SENDER" ] || [ ! -f "$PREFIX/keys/sender" ]; }; then echo "$SIGNER" >"$PREFIX/keys/sender"; fi
    if [ -n "$NEW_SENDER" ] && [ -z "$PEM" ]; then rm -f "$PREFIX/keys/sender.pem"; fi
    if [ -n "$PEM" ] && [ "$PEM" != "$PREFIX/keys/sender.pem" ]; then cp "$PEM" "$PREFIX/keys/sender.pem"; fi
}

# --- volumes ---------------------------------------------------------------------------------------------------------------

# coreutils' own sha256sum is 3 to 4 times slower than openssl where it is not linked with OpenSSL
sum_of() { if has openssl; then openssl dgst -sha256 -r; else sha256sum; fi 2>/dev/null | cut -c 1-64; }
where() { field "$WORK/good" "$1"; } # where VOLUME: the place that look found

# look HOW [FOLDER]: every volume (below FOLDER): "PATH PLACE" into "good", "PATH WHY" into "bad"; any place that has it whole
# will do. HOW is size, for the sizes alone, or sum.
look() {
    local _v _bytes _sha _d _is
    rm -f "$WORK/good"; : >"$WORK/bad"
    rows vol | while read -r _v _bytes _sha; do
        case $_v in "${2:-}"*) ;; *) continue ;; esac
        _is=missing
        while read -r _d; do
            [ -f "$_d/$_v" ] || continue
            _is=$(stat -L -c %s "$_d/$_v")
            if [ "$_is" != "$_bytes" ]; then _is="$_is bytes instead of $_bytes"
            elif [ "$1" = size ] || [ "$(sum_of <"$_d/$_v")" = "$_sha" ]; then echo "$_v $_d/$_v" >>"$WORK/good"; continue 2
            else _is="damaged, or of another bundle"; fi
        done <"$WORK/places"
        echo "$_v $_is" >>"$WORK/bad"
    done
    [ ! -s "$WORK/bad" ]
}

require_volumes() { # require_volumes [FOLDER]
    local _v _why
    ! look sum "${1:-}" || return 0
    while read -r _v _why; do say "BAD   $_v: $_why"; done <"$WORK/bad"
    die 4 "damaged or missing:$(while read -r _v _; do printf ' %s' "$_v"; done <"$WORK/bad")" \
        "copy these again from the sender's disk into the same folder, or name another disk that has them: --also DIR"
}

# join_volumes V1,V2,...: the bytes of a file that may have been split
join_volumes() { for _vol in $(echo "$1" | tr , ' '); do cat "$(where "$_vol")" || return 1; done; }

class_of() { # a GPU's class by its name: forward compatibility is for data centre GPUs
    case $1 in
        *GeForce* | *TITAN* | *Quadro* | *RTX*) echo other ;;
        *Tesla* | *" A"[0-9]* | *" H"[0-9]* | *" L"[0-9]* | *" B"[0-9]* | *" GH"[0-9]* | *" GB"[0-9]* | *" T4"* | *" V100"* | *" P"[0-9]*) echo datacenter ;;
        *) echo other ;;
    esac
}

# judge DRIVER CAP CLASS: "VERDICT REMEDY" of PLAN's answers, which ops/hardware/driver.py made by NVIDIA's rules.
# Of one capability and class the rows run from the newest drivers (FLOOR: the oldest of them) to the oldest.
judge() {
    local _cap _class _floor _answer
    rows gpu | {
        while read -r _cap _class _floor _answer; do
            case $_cap-$_class in "$2-any" | "$2-$3") if not_below "$1" "$_floor"; then echo "$_answer"; exit; fi ;; esac
        done
        echo "gpu-too-new this bundle does not know compute capability $2: carry a newer one"
    }
}

# --- preflight: measured, needed, verdict, remedy --------------------------------------------------------------------------

check() { # check NAME ok|warn|fail MEASURED NEEDED [REMEDY]: a line of "checks"; FAILED counts
    [ "$2" != ok ] || set -- "$1" "$2" "$3" "$4" "nothing to do"
    [ "$2" != fail ] || FAILED=$((FAILED + 1))
    # | parts the fields, and what others say may hold it, or would steer a terminal
    { printf '%s|%s|' "$1" "$2"; printf %s "$3" | tr '|\n' '  '; printf '|%s|%s\n' "$4" "$5"; } | tr -d '\000-\011\013-\037\177' >>"$WORK/checks"
}

expect() { # expect fail|warn NAME MEASURED NEEDED REMEDY TEST...: ok where the test holds
    local _level=$1 _name=$2 _measured=$3 _needed=$4 _remedy=$5
    shift 5
    if "$@"; then _level=ok; fi
    check "$_name" $_level "$_measured" "$_needed" "$_remedy"
}

df_free() { # df_free PATH [-i]: kilobytes (or inodes) free, and where it is mounted
    df -P "${2:--k}" "$1" 2>/dev/null | { read -r _; read -r _ _ _ _free _ _mount; echo "${_free:-?} ${_mount:-?}"; }
}

layers_of() { # layers_of IMAGE: its DiffIDs, one a line; the same on every store
    local _l
    $DOCKER image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" 2>/dev/null | while read -r _l; do [ -z "$_l" ] || echo "$_l"; done
}

# START: how many of our lowest layers an image of the engine has: one of our name, or with our label.
take_stock() {
    local _image _k _x _y
    START=0
    { $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}'
    $DOCKER images --filter label=milktea.wire --format '{{.Repository}}:{{.Tag}}'; } 2>/dev/null | sort -u >"$WORK/candidates"
    while read -r _image; do
        _k=0; layers_of "$_image" >"$WORK/layers.of"
        while read -r _x <&4 && read -r _y <&5 && [ "$_x" = "$_y" ]; do _k=$((_k + 1)); done 4<"$WORK/want" 5<"$WORK/layers.of"
        [ "$_k" -le "$START" ] || START=$_k
    done <"$WORK/candidates"
}

inspect() { # the checks of this server
    : >"$WORK/checks"
    ENGINE='' CONTAINERD='' ROOTLESS='' DATA_ROOT='' START=0 FAILED=0
    check_platform; check_engine; check_bundle
    if [ -n "$ENGINE" ]; then take_stock; check_base; check_disk; fi
    check_prefix
    [ "$KIND" = models ] || { check_memory; check_gpus; }
}

check_platform() {
    local _is _needs
    _is=$(uname -m) _needs=$(plan platform)
    case $_is in x86_64) _is=amd64 ;; aarch64) _is=arm64 ;; esac
    expect fail platform "$_is" "$_needs" "this project makes no image for $_is: use a server with $_needs" [ "$_is" = "$_needs" ]
}
info() { timeout "$PATIENCE" $DOCKER info --format "$1" 2>/dev/null; }
server_is() { ENGINE=$(timeout "$PATIENCE" $DOCKER version --format "{{.$1.Version}}" 2>>"$WORK/err") && fits "$ENGINE" A-Za-z0-9.+~_:-; }

check_engine() {
    local _do _floor=20.10 _kind=Docker
    has "${DOCKER%% *}" || { check engine fail "no docker command" "Docker 20.10 or podman 4" "install Docker Engine or podman from this server's own package source"; return; }
    case $(timeout "$PATIENCE" $DOCKER --version 2>/dev/null) in *podman*) _kind=podman _floor=4.0 ;; esac
    : >"$WORK/err"
    if ! server_is Server && ! server_is Client; then
        [ -s "$WORK/err" ] || echo "no version, within $PATIENCE s" >"$WORK/err"
        ENGINE='' _do="systemctl start docker, then run this again"
        case $(cat "$WORK/err") in *ermission*) _do="run this as root, or: usermod -aG docker $(id -un) and log in again" ;; esac
        check engine fail "the engine does not answer: $(one_line "$WORK/err" 200)" "a running engine" "$_do"
        return
    fi
    case "$(info '{{json .SecurityOptions}}')$(info '{{.Host.Security.Rootless}}')" in *rootless* | *true*) ROOTLESS=yes ;; esac
    expect fail engine "$_kind $ENGINE" "$_floor or newer" "update $_kind to $_floor or newer" not_below "$ENGINE" $_floor
    if [ $_kind = podman ]; then DATA_ROOT=$(info '{{.Store.GraphRoot}}')
        case $REF in docker.io/*) ;; *) REF=docker.io/$REF REPO=docker.io/$REPO STEPS=docker.io/$STEPS ;; esac # else localhost/ goes first
    else
        case $(info '{{json .DriverStatus}}') in *containerd.snapshotter*) CONTAINERD=yes ;; esac
        check store ok "${CONTAINERD:+containerd, whose exit codes are not trusted}$([ -n "$CONTAINERD" ] || info '{{.Driver}}')" "either store"
        DATA_ROOT=$(info '{{.DockerRootDir}}')
        case $DATA_ROOT in /var/snap/*) case $BUNDLE/:$PREFIX in "${HOME:=/root}"/*:"$HOME"/*) ;; *) check snap fail "Docker from snap does not see $BUNDLE or $PREFIX" "folders below $HOME" "copy the bundle below $HOME, and install with --prefix below it" ;; esac ;; esac
        [ -z "$CONTAINERD" ] || [ ! -d "$HOST/var/lib/containerd" ] || ! not_below "$ENGINE" 29 || DATA_ROOT=/var/lib/containerd
    fi
    [ "$CUDA" = none ] || [ "$GPUS" = none ] || check_toolkit $_kind
}

check_toolkit() { # check_toolkit Docker|podman
    local _cdi _spec='' _is="runtime nvidia" _do='' _set="nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
    [ "$1" = Docker ] || _set="nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    for _cdi in "$HOST"/etc/cdi/*nvidia* "$HOST"/var/run/cdi/*nvidia*; do [ ! -f "$_cdi" ] || _spec=$_cdi; done
    case $(info '{{json .Runtimes}}') in
        *nvidia*)
            case ${ROOTLESS:-no}-$(tr -d ' \t' <"$HOST/etc/nvidia-container-runtime/config.toml" 2>/dev/null | tr '\n' ';') in
                no-* | yes-*';no-cgroups=true'[\;#]* | yes-no-cgroups=true*) ;;
                *) _is="rootless engine, and no-cgroups is not set" _do="nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place" ;;
            esac ;;
        *)
            _is="CDI $_spec"
            if [ -z "$_spec" ]; then _is="neither runtime nor CDI" _do="install nvidia-container-toolkit, then $_set"
            elif [ "$1" = Docker ] && case $(info '{{json .CDISpecDirs}}') in *\"*) false ;; esac; then _is="CDI, which Docker $ENGINE does not read as it is set" _do=$_set; fi ;;
    esac
    expect fail toolkit "$_is" "NVIDIA container toolkit or CDI" "$_do" [ -z "$_do" ]
}

check_bundle() { # sizes only: a missing or half-copied volume is named before anything else happens
    local _v _why _n
    _n=$(($(rows vol | wc -l)))
    look size
    expect fail bundle "$_n volumes$(while read -r _v _why; do printf ', %s %s' "$_v" "$_why"; done <"$WORK/bad")" "$_n whole volumes" \
        "copy these again from the sender's disk, or --also DIR" [ ! -s "$WORK/bad" ]
}

check_base() { # of an update: the layers that it builds on
    local _below
    [ "$KIND" = update ] || return 0
    _below=$(plan part) _below=$((${_below%% *} - 1))
    expect fail base "$(if [ "$START" -ge $_below ]; then echo "here"; else echo "pruned or never installed"; fi): $(plan since)" \
        "its $_below lowest layers, $START are here" "carry the full bundle instead" [ "$START" -ge $_below ]
}

check_disk() {
    local _load _more=0 _set _bytes _rest _free _mount _pfree _pmount
    set -- $(plan "room-$START")
    _load=${CONTAINERD:+$2} _load=${_load:-$1}
    [ -z "$MODELS" ] || _more=$(rows model | { while read -r _set _bytes _rest; do [ -d "$PREFIX/models/$_set" ] || _more=$((_more + _bytes)); done; echo $_more; })
    set -- $(df_free "$(existing "$HOST$DATA_ROOT")") $(df_free "$(existing "$PREFIX")") $(df_free "$(existing "$HOST$DATA_ROOT")" -i)
    _free=$1 _mount=$2 _pfree=$3 _pmount=$4
    [ "$_mount" != "$_pmount" ] || { _load=$((_load + _more)); _more=0; }
    room "disk of the engine" "$DATA_ROOT" "$_free" "$_load" "the missing layers, and the largest part while it is unpacked"
    [ "$_more" = 0 ] || room "disk of the folder" "$PREFIX" "$_pfree" "$_more" "the base models"
    case $5 in *[!0-9]* | '' | 0) return 0 ;; esac # btrfs and overlay count none
    [ "$START" -ge "$DEPTH" ] || expect fail inodes "$5 free" "$(plan files)" \
        "free inodes under $DATA_ROOT: docker system prune removes what no container uses" [ "$5" -gt "$(plan files)" ]
}

room() { # room NAME PATH FREE_KB BYTES WHAT_FOR
    case $3 in *[!0-9]* | '') check "$1" warn "cannot be seen from here: $2" "$(human "$4")" "make sure that $2 has $(human "$4") free: $5"; return ;; esac
    expect fail "$1" "$(human $(($3 * 1024))) free in $2" "$(human "$4"): $5" \
        "free $(human $(($4 - $3 * 1024))) there: docker system prune removes what no container uses" [ $(($3 * 1024)) -ge "$4" ]
}

check_prefix() {
    set -- "$(existing "$PREFIX")"
    expect fail folder "$1 $(if [ -w "$1" ]; then echo can; else echo cannot; fi) be written to" "a folder for $PREFIX" \
        "run this as root, or choose another: --prefix DIR" [ -w "$1" ]
}

check_memory() {
    set -- $(field "$HOST/proc/meminfo" MemTotal:) $(plan memory_bytes) # KILOBYTES kB NEEDED
    expect warn memory "$(human $(($1 * 1024)))" "$(human "$3")" \
        "training may be killed for memory: close other programs, or take a smaller base model" [ $(($1 * 1024)) -ge "$3" ]
}

check_gpus() {
    local _g=-1 _name _driver _cap _memory _mig _v _w _do _level _needs _floor
    # "NAME, DRIVER, CAPABILITY, MEMORY, MIG" of each chosen GPU into "gpus"; what nvidia-smi says where it fails into "smi"
    : >"$WORK/gpus"
    if has nvidia-smi; then
        case $GPUS in all | none | *MIG*) set -- ;; *) set -- --id="$GPUS" ;; esac
        set -- nvidia-smi "$@" --format=csv,noheader
        if soon "$WORK/smi" "$@" --query-gpu=name,driver_version,compute_cap,memory.total,mig.mode.current; then mv "$WORK/smi" "$WORK/gpus"
        elif case $(one_line "$WORK/smi" 2000) in *"not a valid field"*) ;; *) false ;; esac && soon "$WORK/smi" "$@" --query-gpu=name,driver_version; then
            while read -r _w; do echo "$_w, ?, ?, ?"; done <"$WORK/smi" >"$WORK/gpus" # an older driver knows no compute_cap
            rm "$WORK/smi"
        fi
    else
        for _w in $(field "$HOST/proc/driver/nvidia/version" NVRM); do case $_w in [0-9]*.[0-9]*) echo "unknown GPU, $_w, ?, ?, ?" >"$WORK/gpus"; break ;; esac; done
    fi
    if [ "$CUDA" = none ] || [ "$GPUS" = none ]; then check driver ok "not needed" "none: the CPU trains"; return; fi
    _floor=$(plan driver) _needs="driver $_floor or newer for CUDA $CUDA"
    if [ -s "$WORK/smi" ]; then
        case $(one_line "$WORK/smi" 2000) in
            *"couldn't communicate"*) _do="modprobe nvidia; where that fails the module was not built for kernel $(uname -r): dkms status, then reinstall the driver or reboot" ;;
            *"version mismatch"*) _do="the driver was updated and the old module still runs: reboot this server" ;;
            *"o devices "*found*) _do="nvidia-smi -L lists the GPUs; choose of these with --gpus"; [ "$GPUS" != all ] || _do="the driver runs and sees no GPU: lspci | grep -i nvidia, dmesg | grep NVRM; in a virtual machine check that the GPU is passed through" ;;
            *libnvidia-ml*) _do="the driver's own library is not found: reinstall the driver with its libnvidia-ml.so.1, then ldconfig" ;;
            *Permission*) _do="run this as root, or as a user who may read /dev/nvidia*: ls -l /dev/nvidia*" ;;
            *lost* | *reset* | *"device handle"* | *"no answer within"*) _do="a GPU does not answer: dmesg | grep NVRM names its error; reboot this server, and if it stays look at its power and its slot" ;;
            *) _do="nvidia-smi must list the GPUs before a container can use one" ;;
        esac
        check driver fail "nvidia-smi says: $(one_line "$WORK/smi" 200)" "$_needs" "$_do"
    elif [ ! -s "$WORK/gpus" ]; then
        _do="install the NVIDIA driver $_floor or newer from this server's own package source"
        for _w in kfd:"AMD (ROCm)" davinci_manager:"Ascend"; do
            [ ! -e "$HOST/dev/${_w%%:*}" ] || _do="this server's GPUs are of ${_w#*:}, for which this project has no image: use a server with NVIDIA GPUs, or --gpus none"
        done
        check driver fail "no NVIDIA driver" "$_needs" "$_do"
    else
        while IFS=, read -r _name _driver _cap _memory _mig; do
            _g=$((_g + 1)) _driver=${_driver# } _cap=${_cap# }
            case $_cap in
                [0-9]*.[0-9]*) ;;
                '?') expect fail driver "$_driver, for $_name" "$_needs" "update the driver to $_floor or newer" not_below "$_driver" "$_floor"; continue ;;
                *) check "gpu $_g" fail "nvidia-smi says: $_name,$_driver, $_cap" "$_needs" "this GPU does not answer: dmesg | grep NVRM names its error; reset it or reboot, or leave it out: --gpus with the numbers of the others"; continue ;;
            esac
            _v=$(judge "$_driver" "$_cap" "$(class_of "$_name")") _do=${_v#* } _v=${_v%% *}
            case $_v in native | minor) _level=ok ;; ptx) _level=warn ;; *) _level=fail _do="$_do; or leave this GPU out: --gpus with the numbers of the others" ;; esac
            check "gpu $_g" $_level "$_name, compute capability $_cap, driver $_driver: $_v" "$_needs" "$_do"
            case $_mig-$GPUS in *Enabled*-MIG*) ;; *Enabled*) check "mig $_g" warn "MIG is on" "one of its devices" "choose with --gpus MIG-..., which nvidia-smi -L lists" ;; esac
        done <"$WORK/gpus"
    fi
}

print_checks() {
    local _name _verdict _m _n _r
    while IFS='|' read -r _name _verdict _m _n _r; do
        say "$(printf '%-5s %-20s %s (needs %s)' "$_verdict" "$_name" "$_m" "$_n")"
        [ "$_verdict" = ok ] || say "        do this: $_r"
    done <"$WORK/checks"
}

# The server in lines, for the sender: the next bundle then holds only what is missing (ops/image/bundle/inventory.py).
print_facts() {
    local _line _d
    printf 'milktea-server 1\nserver %s\nengine %s\nstore %s\nkernel %s\n' "$(uname -n)" "$ENGINE" "${CONTAINERD:+containerd}" "$(uname -r)"
    while read -r _line; do echo "gpu $_line"; done <"$WORK/gpus"
    [ ! -f "$WORK/candidates" ] || while read -r _line; do
        echo "image $_line"
        layers_of "$_line" | while read -r _d; do echo "layer $_d"; done
    done <"$WORK/candidates"
    for _d in "$PREFIX"/models/*; do [ ! -f "$_d/config.json" ] || echo "model ${_d##*/}"; done
    while read -r _line; do echo "check $_line"; done <"$WORK/checks"
}

# --- load: archives that each carry what the one before lacks --------------------------------------------------------------

id_of() { # id_of IMAGE: its ID without "sha256:"
    local _id
    _id=$($DOCKER image inspect --format '{{.Id}}' "$1" 2>/dev/null) && echo "${_id#sha256:}"
}

# An image is ours by the digest of its config (or of its manifest, on the containerd store), and by its layers: another image
# with these layers and another ENTRYPOINT is another image.
is_ours() {
    case $(id_of "$REF") in "${CONFIG#sha256:}" | "${MANIFEST#sha256:}") ;; *) return 1 ;; esac
    layers_of "$REF" >"$WORK/got" && [ "$(sum_of <"$WORK/got")" = "$(sum_of <"$WORK/want")" ]
}

load_image() {
    is_ours && { say "image already here, all $DEPTH layers"; drop_intermediate; return 0; }
    TOUCHED=yes
    load_parts
    if ! is_ours && [ "$START" -gt 0 ] && [ "$KIND" = full ]; then
        say "image what was here does not fit (other blobs, or a damaged store); loading every layer"
        drop_intermediate
        $DOCKER rmi -f "$REF" >/dev/null 2>&1
        START=0; load_parts
    fi
    is_ours || die 6 "the engine loaded $REF, and it is not the image of the signed plan: $(id_of "$REF"); its last words: $(one_line "$WORK/engine")" \
        "look at the engine's log and its disk ($DOCKER info), then run this again"
    drop_intermediate
}

load_parts() {
    local _first _last _files _tag _do
    rows part >"$WORK/parts"
    while read -r _first _last _files <&7; do
        # the last part brings the config: it is loaded also where every layer is here
        [ "$_last" -gt "$START" ] || [ "$_last" = "$DEPTH" ] || continue
        say "image layers $_first to $_last of $DEPTH"
        _tag=$(if [ "$_last" = "$DEPTH" ]; then echo "$REF"; else printf '%s-%02d' "$STEPS" "$_last"; fi)
        case $_files in
            *,*) join_volumes "$_files" | $DOCKER load -q >"$WORK/engine" 2>&1 ;;
            *) $DOCKER load -q -i "$(where "$_files")" >"$WORK/engine" 2>&1 </dev/null ;;
        esac
        # the exit code says little: the containerd store answers 0 for a broken image
        layers_of "$_tag" >"$WORK/got"
        if [ "$(head -n "$_last" "$WORK/want" | sum_of)" != "$(sum_of <"$WORK/got")" ]; then
            [ "$START" = 0 ] || [ "$KIND" = update ] || return 0 # load_image tries once more from the bottom
            _do="run this again; if it stays, look at the engine's log (journalctl -u docker)"
            case $(cat "$WORK/engine") in *"no space left"*) _do="free room in $DATA_ROOT ($DOCKER system df shows what takes it), then run this again" ;; esac
            die 6 "the engine did not take $_files, although its hash is right: $(one_line "$WORK/engine")" "$_do"
        fi
    done 7<"$WORK/parts"
}

drop_intermediate() {
    local _image
    $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}' 2>/dev/null | while read -r _image; do
        case /$_image in */"$STEPS"-*) $DOCKER rmi "$_image" >/dev/null 2>&1 </dev/null ;; esac
    done
}

# After a refusal: nothing of this run stays, what was there before is untouched.
undo() {
    TOUCHED=; drop_intermediate
    [ -n "$ID_BEFORE" ] || $DOCKER rmi -f "$REF" >/dev/null 2>&1
    rm -rf "$PREFIX"/models/.part-*
}

# --- prove, make current, take back ----------------------------------------------------------------------------------------

# inside OPTIONS... -- PROGRAM ARGUMENTS...: a container of the verified image: no network, nothing of the image writable.
inside() {
    local _label=''
    [ "$(cat /sys/fs/selinux/enforce 2>/dev/null)" != 1 ] || _label="--security-opt label=disable"
    $DOCKER run --rm --network=none --read-only --tmpfs /tmp:rw,exec,mode=1777 --cap-drop=ALL --security-opt no-new-privileges $_label \
        --shm-size 1g -e HOME=/tmp "$@"
}

python() { # python TOOL ARGUMENTS...: a tool of this bundle, by the image's Python; sees the bundle and the prefix
    local _tool=$1 _d
    shift
    set -- --entrypoint "$(plan python)" "$REF" "/small/tools/$_tool" "$@"
    while read -r _d; do set -- -v "$_d:$_d:ro" "$@"; done <"$WORK/places"
    [ -n "$ROOTLESS" ] || set -- --user "$(id -u):$(id -g)" "$@" # rootless engines map root to the user already
    inside -i -v "$SMALL:/small:ro" -v "$PREFIX:$PREFIX" "$@"
}

gpu_flags() {
    local _g
    [ "$CUDA" = none ] || [ "$GPUS" = none ] && return
    case $(info '{{json .Runtimes}}') in
        *nvidia*) if [ "$GPUS" = all ]; then echo "--gpus all"; else echo "--gpus \"device=$GPUS\""; fi ;;
        *) for _g in $(echo "$GPUS" | tr , ' '); do echo "--device nvidia.com/gpu=$_g"; done ;;
    esac
}

prove() {
    local _rc _prove
    _prove=$(plan prove)
    say "prove the self-test runs with no network and a read-only image"
    [ "$CUDA" = none ] || [ "$GPUS" = none ] || _prove="$_prove --expect-gpu"
    inside --entrypoint "$(plan python)" -v "$SMALL:/small:ro" "$REF" -c 'open("/small/PLAN")' >"$WORK/selftest" 2>&1 ||
        die 3 "the engine does not see $SMALL, or starts no container: $(one_line "$WORK/selftest")" "use an engine of this machine that may read $PREFIX (Docker from snap sees only the home folder: --prefix below it)"
    inside $(gpu_flags) -e "MILKTEA_MODELS=/run/milktea/models" -v "$PREFIX/models:/run/milktea/models:ro" -v "$SMALL/image.lock:/run/milktea/image.lock:ro" \
        --entrypoint "${_prove%% *}" "$REF" ${_prove#* } >"$WORK/selftest" 2>"$WORK/selftest.err"
    _rc=$?
    [ $_rc = 0 ] && return 0
    mkdir -p "$PREFIX/records"
    cat "$WORK/selftest" "$WORK/selftest.err" >"$PREFIX/records/selftest-failed-$ID.txt"
    die 7 "the self-test of $REF failed with exit code $_rc: $(tail -c 400 "$WORK/selftest.err" | tr '\n' ' ')" "send $PREFIX/records/selftest-failed-$ID.txt to the sender; the image that was current before still is"
}

state_of() { field "$PREFIX/state/$NAME" "$1"; } # state_of current|previous|release

write_state() { # write_state CURRENT PREVIOUS RELEASE: the file is the truth, the tags follow it
    printf 'current %s\nrelease %s\ngpus %s\nprevious %s\n' "$1" "$3" "$GPUS" "$2" >"$PREFIX/state/$NAME.part"
    mv "$PREFIX/state/$NAME.part" "$PREFIX/state/$NAME"
    [ -f "$PREFIX/state/default" ] || echo "$NAME" >"$PREFIX/state/default"
    $DOCKER tag "$1" "$REPO:current"
    [ -z "$2" ] || $DOCKER tag "$2" "$REPO:previous"
}

activate() {
    local _before
    _before=$(state_of current) || _before=
    [ "$_before" != "$REF" ] || _before=$(state_of previous) || _before=
    python installer.py tools "$PREFIX" >"$WORK/tools.err" 2>&1 || die 3 "the tools do not arrive in $PREFIX: $(one_line "$WORK/tools.err")" "check its disk for room and errors, then run this again"
    pin_sender
    write_state "$REF" "$_before" "$RELEASE"
    TOUCHED=
}

# What was verified, for the security officer: written by the image's Python, signed with this server's own key.
record() {
    local _key=$PREFIX/keys/server _file
    { print_facts; printf 'when %s\nwho %s\nsums %s\nsignature %s\nvolumes %s\nref %s\nid %s\nprevious %s\nforced %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(id -un)" \
        "$(sum_of <"$SMALL/SHA256SUMS")" "$SIGNED" "$(($(rows vol | wc -l)))" "$REF" "$(id_of "$REF")" "$(state_of previous)" "$FORCE"; echo selftest; cat "$WORK/selftest"; } |
        python installer.py record "$PREFIX" >"$WORK/record.err" 2>&1 || say "note  no record: $(one_line "$WORK/record.err")"
    has ssh-keygen || return 0
    [ -f "$_key" ] || ssh-keygen -q -t ecdsa -b 256 -m PEM -N '' -C "milktea server $(uname -n)" -f "$_key" </dev/null
    for _file in "$PREFIX/INSTALL-RECORD.json" "$PREFIX/EVIDENCE.html"; do
        rm -f "$_file.sig"
        [ ! -f "$_file" ] || ssh-keygen -q -Y sign -f "$_key" -n milktea-evidence "$_file" 2>/dev/null </dev/null
    done
}

rollback() { # the same as milktea-run rollback, which needs no disk
    [ -x "$PREFIX/bin/milktea-run" ] || die 2 "nothing of $NAME is installed in $PREFIX" "sh INSTALL.sh install"
    MILKTEA_PREFIX=$PREFIX "$PREFIX/bin/milktea-run" rollback "$NAME"
}

preflight() { inspect; [ -z "$FACTS" ] || print_facts; print_checks; [ "$FAILED" = 0 ] || exit 3; }
verify() { require_volumes; say "whole: $(($(rows vol | wc -l))) volumes, signature $SIGNED"; }

install() {
    local _older
    _older=$(state_of release) || _older=0
    [ "$RELEASE" -ge "$_older" ] || [ -n "$OLDER" ] || die 5 "this bundle is release $RELEASE, and $_older is installed: an older one may bring back what was mended" "ask the sender for the newest; or add --allow-older"
    inspect
    print_checks
    [ "$FAILED" = 0 ] || [ -n "$FORCE" ] || die 3 "$FAILED of the checks above say no" "mend what they name, in that order, and run this again (--force goes on all the same)"
    [ -n "$ENGINE" ] || die 3 "no Docker engine" "see the check named engine"
    lock
    ID_BEFORE=$(id_of "$REF")
    say "verify every volume, before anything is loaded"
    require_volumes "$(if [ -z "$MODELS" ]; then echo parts/; fi)"
    [ "$KIND" = models ] || load_image
    mkdir -p "$PREFIX/models"
    TOUCHED=yes
    if [ -n "$MODELS" ] && [ -n "$(plan model)" ]; then
        python installer.py models "$PREFIX" <"$WORK/good" >&3 2>"$WORK/models.err" || die 4 "a base model does not arrive whole: $(one_line "$WORK/models.err")" "check the disk of $PREFIX for room and errors, then run this again"
    fi
    if [ "$KIND" != models ]; then prove; activate; else pin_sender; echo "no image in this bundle" >"$WORK/selftest"; fi
    record
    say "DONE  $(if [ "$KIND" = models ]; then echo "$PREFIX/bin/milktea-run models lists them"; else echo "$REF is current; try: $PREFIX/bin/milktea-run check"; fi)"
}

lock() {
    local _holder
    mkdir -p "$PREFIX/state" 2>/dev/null || die 3 "cannot write to $PREFIX" "run this as root, or choose another folder: --prefix DIR"
    if ! mkdir "$PREFIX/state/lock" 2>/dev/null; then
        _holder=$(cat "$PREFIX/state/lock/pid" 2>/dev/null)
        [ -z "$_holder" ] || ! kill -0 "$_holder" 2>/dev/null || die 8 "another INSTALL.sh works here (process $_holder)" "wait until it is done"
        say "note  an earlier run was cut off; going on where it was"
        rm -rf "$PREFIX"/state/work.* "$PREFIX"/models/.part-*
    fi
    LOCKED=yes
    echo $$ >"$PREFIX/state/lock/pid"
    # containers get files of it: it must lie where the engine sees the prefix
    mv "$WORK" "$PREFIX/state/work.$$" && WORK=$PREFIX/state/work.$$ SMALL=$PREFIX/state/work.$$/small
}
wrong_use() { printf 'REFUSED: %s\n' "$1" >&2; exit 2; }

main() {
    local _word
    while [ $# -gt 0 ]; do
        _word=$1
        case $_word in --prefix | --also | --key | --gpus) [ $# -ge 2 ] || wrong_use "$_word wants a value: sh INSTALL.sh --help"; shift ;; esac
        case $_word in
            install | preflight | verify | rollback) COMMAND=$_word ;;
            --prefix) PREFIX=$1 ;;
            --also) ALSO=$(printf '%s\n%s' "$(cd "$1" && pwd)" "$ALSO") ;;
            --key) KEY=$1; case $1 in SHA256:*) ;; *) [ -f "$1" ] || wrong_use "--key $1 does not exist" ;; esac ;;
            --gpus) GPUS=$1; case $1 in *[!A-Za-z0-9,-]* | '') wrong_use "--gpus $1: 0,1 or the UUIDs of MIG devices, or none" ;; esac ;;
            --new-sender) NEW_SENDER=yes ;; --require-signature) NEED_SIGNATURE=yes ;; --allow-older) OLDER=yes ;;
            --facts) FACTS=yes ;; --no-models) MODELS= ;; --force) FORCE=yes ;;
            -h | --help) usage; exit 0 ;;
            *) wrong_use "$_word is no word of INSTALL.sh: sh INSTALL.sh --help" ;;
        esac
        shift
    done
    [ -z "$NEW_SENDER" ] || [ -n "$KEY" ] || wrong_use "--new-sender wants --key"
    case $PREFIX in /*) ;; *) PREFIX=$(pwd)/$PREFIX ;; esac
    if [ -n "$FACTS" ]; then exec 3>&2; else exec 3>&1; fi
    WORK=$(mktemp -d) || exit 3
    printf '%s\n' "$BUNDLE" ${ALSO:+"$ALSO"} >"$WORK/places"
    trap 'rm -rf "$WORK"; [ -z "$LOCKED" ] || rm -rf "$PREFIX/state/lock"' EXIT
    trap 'exit 143' INT TERM HUP
    copy_small
    check_signature
    read_plan
    $COMMAND
}

# The brace that opened at the top closes here: the shell reads the whole script before it runs any of it.
main "$@"; exit $?; }
