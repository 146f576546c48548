#!/bin/sh
# Brings the milktea bundle in this folder onto a server without a network, proves it, and can take it back.
# Needs sh, docker (or podman) and coreutils, and ssh-keygen or openssl to check the sender's signature. Runs in dash,
# busybox ash and bash. Killed anywhere and started again, it finishes. What comes after the image is loaded and verified
# (models, records, the evidence page) is Python inside that image: tools/installer.py.
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
WORK='' LOCKED='' TOUCHED='' SMALL=''

has() { command -v "$1" >/dev/null 2>&1; }
DOCKER=${DOCKER:-$(if has docker || ! has podman; then echo docker; else echo podman; fi)}

say() { printf '%s\n' "$*" >&3; }

# die CODE WHAT REMEDY: the three parts of every refusal: what happened, how the server is now, what to type next.
die() {
    [ -z "$TOUCHED" ] || undo
    printf 'REFUSED: %s\n  server:  as it was before\n  do this: %s\n' "$2" "$3" >&2
    exit "$1"
}

leave() {
    [ -n "$WORK" ] && rm -rf "$WORK"
    [ -n "$LOCKED" ] && rm -rf "$PREFIX/state/lock"
    WORK='' LOCKED=''
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

# The nearest existing folder of a path: what a question about its disk is asked of.
existing() {
    local _d
    _d=$1
    while [ ! -d "$_d" ] && [ "$_d" != / ]; do _d=$(dirname "$_d"); done
    echo "$_d"
}

one_line() { head -c "${2:-300}" "$1" 2>/dev/null | tr '\n' ' '; } # one_line FILE [BYTES]

# --- the small files: copied first, verified as copies, and only the copies are used ---------------------------------------

plan() { # plan KEY: the rest of the first line of PLAN that begins with KEY
    local _k _rest
    while read -r _k _rest; do
        [ "$_k" = "$1" ] && { echo "$_rest"; return 0; }
    done <"$SMALL/PLAN"
    return 1
}

rows() { # rows KEY: the rest of every line that begins with KEY
    local _k _rest
    while read -r _k _rest; do [ "$_k" = "$1" ] && echo "$_rest"; done <"$SMALL/PLAN"
    return 0
}

fits() { # fits TEXT CHARACTERS: not empty, of these characters alone, no path that leaves its folder
    case $1 in '' | *[!$2]* | -* | .* | */../* | */.. | /*) return 1 ;; esac
}

copy_small() {
    local _sha _path
    SMALL=$WORK/small
    mkdir -p "$SMALL"
    for _path in SHA256SUMS SHA256SUMS.sig SHA256SUMS.openssl; do
        [ ! -f "$BUNDLE/$_path" ] || cp "$BUNDLE/$_path" "$SMALL/$_path"
    done
    [ -f "$SMALL/SHA256SUMS" ] || die 4 "$BUNDLE/SHA256SUMS is missing: this is not a whole bundle" "copy SHA256SUMS from the sender's disk again"
    while read -r _sha _path; do
        fits "$_sha" 0-9a-f && [ ${#_sha} = 64 ] && fits "$_path" 'A-Za-z0-9._/+-' ||
            die 4 "SHA256SUMS is damaged: one of its lines is not a hash and a path" "copy SHA256SUMS from the sender's disk again"
        case $_path in parts/* | models/*) continue ;; esac
        [ -f "$BUNDLE/$_path" ] || die 4 "$_path is missing (or SHA256SUMS is damaged)" "copy $_path and SHA256SUMS from the sender's disk again"
        mkdir -p "$SMALL/$(dirname "$_path")"
        cp "$BUNDLE/$_path" "$SMALL/$_path" || die 4 "$_path cannot be read" "copy $_path from the sender's disk again"
        echo "$_sha *$_path" >>"$WORK/small.sums"
    done <"$SMALL/SHA256SUMS"
    for _path in PLAN INSTALL.sh; do
        [ -f "$SMALL/$_path" ] || die 4 "SHA256SUMS is damaged: $_path is not in it" "copy SHA256SUMS from the sender's disk again"
    done
}

verify_small() {
    local _sha _path
    while read -r _sha _path; do
        [ "$(sum_of <"$SMALL/${_path#\*}")" = "$_sha" ] ||
            die 4 "${_path#\*} is damaged, or belongs to another bundle" "copy ${_path#\*} from the sender's disk again"
    done <"$WORK/small.sums"
}

read_plan() {
    local _n _diff _rest _v _where
    [ "$(plan milktea-bundle)" = 4 ] || die 4 "PLAN is of another milktea than this INSTALL.sh" "copy the whole bundle again"
    NAME=$(plan name) ID=$(plan id) KIND=$(plan kind) RELEASE=$(plan release) REF=$(plan ref) REPO=${REF%:*} CUDA=$(plan cuda)
    STEPS=$(plan intermediate) CONFIG=$(plan config) MANIFEST=$(plan manifest)
    _where="PLAN is damaged"
    fits "$NAME" a-z0-9.- && fits "$ID" 0-9a-f && fits "$RELEASE" 0-9 && fits "$REF" 'a-z0-9._/:-' && fits "$STEPS" 'a-z0-9._/:-' ||
        die 4 "$_where: a name in it is none" "do not install it; ask the sender"
    [ "$REF" = "$REPO:$ID" ] && [ "${STEPS%:*}" = "$REPO" ] && [ "${REPO##*/}" = "$NAME" ] ||
        die 4 "$_where: its names do not belong together" "do not install it; ask the sender"
    { rows vol; rows model; } | while read -r _v _rest; do fits "$_v" 'A-Za-z0-9._/+-' || exit 1; done ||
        die 4 "$_where: a path in it leaves the bundle" "do not install it; ask the sender"
    rows layer | while read -r _n _diff _rest; do echo "$_diff"; done >"$WORK/want"
    DEPTH=$(($(wc -l <"$WORK/want")))
}

# --- the signature: a given or a known key accepts nothing but "good" ------------------------------------------------------

FINGERPRINT='' PEM='' # the sender's key as it is trusted here: what ssh-keygen prints of it, and a file for openssl

# What --key says, else what the first install here wrote down. A key on the carried disk is no key received another way.
trusted_key() {
    local _known='' _file _given=''
    [ ! -f "$PREFIX/keys/sender" ] || read -r _known <"$PREFIX/keys/sender"
    TRUST="with the key that this server knows"
    if [ -z "$KEY" ]; then
        FINGERPRINT=$_known
        [ ! -f "$PREFIX/keys/sender.pem" ] || PEM=$PREFIX/keys/sender.pem
        return
    fi
    TRUST="with the key given by --key"
    case $KEY in
        SHA256:*) _given=$KEY ;;
        *)
            case $(cd "$(dirname "$KEY")" && pwd)/ in "$BUNDLE"/*) die 5 "--key $KEY lies on the disk that it is to vouch for" "get the sender's key by another way than this disk" ;; esac
            for _file in "$BUNDLE"/* "$BUNDLE"/*/*; do
                [ ! -f "$_file" ] || [ "$(stat -c %s "$_file")" != "$(stat -L -c %s "$KEY")" ] || [ "$(sum_of <"$_file")" != "$(sum_of <"$KEY")" ] ||
                    die 5 "--key $KEY is the file ${_file#"$BUNDLE"/} of the disk that it is to vouch for" "get the sender's key by another way than this disk"
            done
            if [ "$(head -c 10 "$KEY")" = "-----BEGIN" ]; then PEM=$KEY
            else
                has ssh-keygen || die 5 "ssh-keygen is not here to read $KEY" "ask the sender for the key as .pem, for openssl"
                _given=$(ssh-keygen -l -f "$KEY" 2>/dev/null | { read -r _ _given _ && echo "$_given"; })
                [ -n "$_given" ] || die 2 "--key $KEY is not a public key" "give the sender's .pub or .pem file, or SHA256:..."
            fi ;;
    esac
    FINGERPRINT=$_given
    [ -n "$NEW_SENDER" ] && return
    if [ -n "$_known" ] && [ -n "$_given" ] && [ "$_known" != "$_given" ] || { [ -f "$PREFIX/keys/sender.pem" ] && [ -n "$PEM" ] && [ "$(sum_of <"$PEM")" != "$(sum_of <"$PREFIX/keys/sender.pem")" ]; }; then
        die 5 "this server knows another sender ($_known) than --key says" "ask the sender whether the key changed; only if they say so by another way than this disk, add --new-sender"
    fi
    # what is known and is not given must hold as well
    [ -n "$FINGERPRINT" ] || FINGERPRINT=$_known
    [ -n "$PEM" ] || [ ! -f "$PREFIX/keys/sender.pem" ] || PEM=$PREFIX/keys/sender.pem
}

check_signature() {
    local _sums=$SMALL/SHA256SUMS _said _by
    trusted_key
    SIGNED='' SIGNER=''
    if [ ! -f "$_sums.sig" ] && [ ! -f "$_sums.openssl" ]; then SIGNED="not signed"; fi
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
        openssl dgst -sha256 -verify "$PEM" -signature "$_sums.openssl" "$_sums" >"$WORK/signature" 2>&1 ||
            die 5 "wrong signature: SHA256SUMS.openssl was not made by the key that is trusted here ($TRUST)" "do not install it; ask the sender by another way than this disk"
        SIGNED="good, by openssl${SIGNED:+ and ssh-keygen}, $TRUST"
    fi
    [ -n "$SIGNED" ] || SIGNED="not checked: no tool here for the key and the signature that there are"
    case $SIGNED in
        good*) return ;;
    esac
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

where() { # where VOLUME: the place that verification found whole, or else the first that exists
    local _p _real _d
    if [ -f "$WORK/good" ]; then
        while read -r _p _real; do [ "$_p" = "$1" ] && { echo "$_real"; return 0; }; done <"$WORK/good"
    fi
    printf '%s\n%s' "$BUNDLE" "$ALSO" | { while read -r _d; do [ -n "$_d" ] && [ -f "$_d/$1" ] && { echo "$_d/$1"; exit 0; }; done; exit 1; }
}

# verify_volumes PATTERN...: each volume by itself, several at a time. Fills "good" (PATH PLACE) and "bad" (PATH WHY).
verify_volumes() {
    local _v _bytes _sha _f _take _at _n=0 _cores
    _cores=$(nproc 2>/dev/null) || _cores=1
    rm -f "$WORK"/good "$WORK"/bad "$WORK"/good.* "$WORK"/bad.*
    while read -r _v _bytes _sha; do
        _take=
        # shellcheck disable=SC2254
        for _f in "$@"; do case $_v in $_f) _take=yes ;; esac; done
        [ -n "$_take" ] || continue
        verify_one "$_v" "$_bytes" "$_sha" $((_n % _cores)) &
        _n=$((_n + 1))
        [ $((_n % _cores)) != 0 ] || wait
    done <<ROWS
$(rows vol)
ROWS
    wait
    cat "$WORK"/good.* >"$WORK/good" 2>/dev/null
    cat "$WORK"/bad.* >"$WORK/bad" 2>/dev/null
    [ ! -s "$WORK/bad" ]
}

verify_one() { # verify_one VOLUME BYTES SHA256 N: any place that has it whole will do
    local _d _is='missing'
    printf '%s\n%s' "$BUNDLE" "$ALSO" | {
        while read -r _d; do
            [ -n "$_d" ] && [ -f "$_d/$1" ] || continue
            _is=$(stat -L -c %s "$_d/$1")
            if [ "$_is" != "$2" ]; then _is="$_is bytes instead of $2"
            elif [ "$(sum_of <"$_d/$1")" = "$3" ]; then echo "$1 $_d/$1" >>"$WORK/good.$4"; exit 0
            else _is="damaged, or of another bundle"; fi
        done
        echo "$1 $_is" >>"$WORK/bad.$4"
    }
}

require_volumes() { # require_volumes PATTERN...
    local _v _why
    verify_volumes "$@" && return 0
    while read -r _v _why; do say "BAD   $_v: $_why"; done <"$WORK/bad"
    die 4 "damaged or missing:$(while read -r _v _; do printf ' %s' "$_v"; done <"$WORK/bad")" \
        "copy these again from the sender's disk into the same folder, or name another disk that has them: --also DIR"
}

join_volumes() { # join_volumes V1,V2,...: the bytes of a file that may have been split
    local _list=$1 _real
    while [ -n "$_list" ]; do
        _real=$(where "${_list%%,*}") && cat "$_real" || return 1
        case $_list in *,*) _list=${_list#*,} ;; *) _list= ;; esac
    done
}

# --- may this driver run this image on this GPU? PLAN has a row for each image line and compute capability, which
# --- ops/hardware/driver.py made by NVIDIA's rules (CUDA Compatibility guide) --------------------------------------------------

# A GPU's class by its name: forward compatibility is for data centre GPUs.
class_of() {
    case $1 in
        *GeForce* | *TITAN* | *Quadro* | *RTX*) echo other ;;
        *Tesla* | *" A"[0-9]* | *" H"[0-9]* | *" L"[0-9]* | *" B"[0-9]* | *" GH"[0-9]* | *" GB"[0-9]* | *" T4"* | *" V100"* | *" P"[0-9]*) echo datacenter ;;
        *) echo other ;;
    esac
}

# judge DRIVER CAP CLASS: "VERDICT REMEDY"; verdicts: native minor ptx compat driver-too-old gpu-too-old gpu-too-new.
# Of a row: HOW is cubin, ptx, old or new; FLOOR is the oldest driver that runs it, NATIVE the one that knows all of its CUDA,
# COMPAT the branches with NVIDIA's compat package, LAST the newest branch that knows the GPU.
judge() {
    local _own _line _cuda _cap _how _floor _native _compat _last _verdict='' _carry='' _update='' _needs='' _package=''
    _own=$(plan line_name)
    while read -r _line _cuda _cap _how _floor _native _compat _last; do
        [ "$_cap" = "$2" ] || continue
        if [ "$_line" = "$_own" ]; then
            _needs=$_floor _package=cuda-compat-$(echo "$_cuda" | tr . -)
            case $_how in
                old | new) _verdict=gpu-too-$_how ;;
                *)
                    if not_below "$1" "$_native"; then _verdict=native; elif not_below "$1" "$_floor"; then _verdict=minor; else _verdict=driver-too-old; fi
                    if [ "$_how" = ptx ] && [ $_verdict != driver-too-old ]; then _verdict=ptx; fi
                    if [ "$_how$_verdict$3" = cubindriver-too-olddatacenter ]; then case ,$_compat, in *,"${1%%.*}",*) _verdict=compat ;; esac; fi
                    [ "${_floor%%.*}" -gt "$_last" ] || _update="update the driver to $_floor or newer" ;;
            esac
        fi
        case $_how in cubin | ptx) if not_below "$1" "$_floor"; then _carry="$_carry${_carry:+ or }$_line"; fi ;; esac
    done <<ROWS
$(rows gpu)
ROWS
    _carry=${_carry:+carry a bundle of the image line $_carry}
    case $_verdict in
        '') echo "gpu-too-new ${_carry:-this bundle does not know compute capability $2: carry a newer one}" ;;
        native | minor) echo "$_verdict nothing to do" ;;
        ptx) echo "ptx nothing to do; the first start compiles for this GPU and takes minutes${_carry:+; $_carry to avoid it}" ;;
        gpu-too-old) echo "$_verdict ${_carry:-this GPU needs an older CUDA than any image line here has: use another GPU}" ;;
        gpu-too-new) echo "$_verdict ${_carry:-carry an image line with a newer CUDA}" ;;
        *)
            [ $_verdict != compat ] || _update="$_update${_update:+, or }start with MILKTEA_CUDA_COMPAT=the folder of NVIDIA's package $_package"
            echo "$_verdict $_update${_update:+${_carry:+, or }}$_carry" ;;
    esac
}

# --- preflight: measured, needed, verdict, remedy --------------------------------------------------------------------------

check() { # check NAME ok|warn|fail MEASURED NEEDED [REMEDY]
    printf '%s|%s|%s|%s|%s\n' "$1" "$2" "$3" "$4" "${5:-nothing to do}" >>"$WORK/checks"
}

df_free() { # df_free PATH [-i]: kilobytes (or inodes) free, and where it is mounted
    df -P "${2:--k}" "$1" 2>/dev/null | { read -r _; read -r _ _ _ _free _ _mount; echo "${_free:-?} ${_mount:-?}"; }
}

layers_of() { # layers_of IMAGE: its DiffIDs, one a line; the same on every store
    local _l
    $DOCKER image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" 2>/dev/null | while read -r _l; do [ -z "$_l" ] || echo "$_l"; done
}

candidates() { # images that may hold layers of ours: those of our name, and those with our label
    { $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}'; $DOCKER images --filter label=milktea.wire --format '{{.Repository}}:{{.Tag}}'; } 2>/dev/null | sort -u
}

# START: how many of our lowest layers an image of the engine has.
take_stock() {
    local _image _k _x _y
    START=0
    candidates >"$WORK/candidates"
    while read -r _image; do
        layers_of "$_image" >"$WORK/layers.of"
        _k=0
        while read -r _x <&4 && read -r _y <&5 && [ "$_x" = "$_y" ]; do _k=$((_k + 1)); done 4<"$WORK/want" 5<"$WORK/layers.of"
        [ "$_k" -le "$START" ] || START=$_k
    done <"$WORK/candidates"
}

preflight() {
    local _verdict _rest
    : >"$WORK/checks"
    ENGINE='' CONTAINERD='' DATA_ROOT='' START=0
    check_platform
    check_engine
    check_bundle
    if [ -n "$ENGINE" ]; then take_stock; check_base; check_disk; fi
    check_prefix
    check_memory
    check_gpus
    FAILED=$(while IFS='|' read -r _ _verdict _rest; do [ "$_verdict" != fail ] || echo; done <"$WORK/checks" | wc -l)
    FAILED=$((FAILED))
}

check_platform() {
    local _is
    _is=$(uname -m)
    case $_is in x86_64) _is=amd64 ;; aarch64) _is=arm64 ;; esac
    if [ "$_is" = "$(plan platform)" ]; then check platform ok "$_is" "$(plan platform)"
    else check platform fail "$_is" "$(plan platform)" "this project makes no image for $_is: use a server with $(plan platform)"; fi
}

info() { $DOCKER info --format "$1" 2>/dev/null; }

check_engine() {
    local _why _floor=20.10 _kind=Docker _root
    has "${DOCKER%% *}" || { check engine fail "no docker command" "Docker 20.10 or podman 4" "install Docker Engine or podman from this server's own package source"; return; }
    case $($DOCKER --version 2>/dev/null) in *podman*) _kind=podman _floor=4.0 ;; esac
    if ! ENGINE=$($DOCKER version --format '{{.Server.Version}}' 2>"$WORK/err") && ! ENGINE=$($DOCKER version --format '{{.Client.Version}}' 2>>"$WORK/err"); then
        ENGINE='' _why=$(one_line "$WORK/err" 200)
        case $_why in
            *ermission*) check engine fail "no permission for the engine's socket" "access to Docker" "run this as root, or: usermod -aG docker $(id -un) and log in again" ;;
            *) check engine fail "the engine does not answer: $_why" "a running Docker engine" "systemctl start docker, then run this again" ;;
        esac
        return
    fi
    if not_below "$ENGINE" $_floor; then check engine ok "$_kind $ENGINE" "$_floor or newer"
    else check engine fail "$_kind $ENGINE" "$_floor or newer" "update $_kind to $_floor or newer"; fi
    if [ $_kind = podman ]; then DATA_ROOT=$(info '{{.Store.GraphRoot}}')
    else
        case $(info '{{json .DriverStatus}}') in *containerd.snapshotter*) CONTAINERD=yes ;; esac
        check store ok "${CONTAINERD:+containerd, whose exit codes are not trusted}$([ -n "$CONTAINERD" ] || info '{{.Driver}}')" "either store"
        DATA_ROOT=$(info '{{.DockerRootDir}}')
        case $DATA_ROOT in /var/snap/*) case $BUNDLE/ in "$HOME"/*) ;; *) check snap fail "Docker from snap does not see $BUNDLE" "a folder below $HOME" "copy the bundle below $HOME, and install with --prefix below it" ;; esac ;; esac
        [ -z "$CONTAINERD" ] || [ ! -d "$HOST/var/lib/containerd" ] || ! not_below "$ENGINE" 29 || DATA_ROOT=/var/lib/containerd
    fi
    [ "$CUDA" = none ] || [ "$GPUS" = none ] || check_toolkit $_kind
}

check_toolkit() { # check_toolkit Docker|podman
    local _cdi _spec='' _needs="NVIDIA container toolkit or CDI" _rootless=''
    case "$(info '{{json .SecurityOptions}}')$(info '{{.Host.Security.Rootless}}')" in *rootless* | *true*) _rootless=yes ;; esac
    for _cdi in "$HOST"/etc/cdi/*nvidia* "$HOST"/var/run/cdi/*nvidia*; do [ ! -f "$_cdi" ] || _spec=$_cdi; done
    case $(info '{{json .Runtimes}}') in
        *nvidia*)
            if [ -n "$_rootless" ] && ! { while read -r _cdi; do case $_cdi in no-cgroups*true*) exit 0 ;; esac; done <"$HOST/etc/nvidia-container-runtime/config.toml"; exit 1; } 2>/dev/null; then
                check toolkit fail "rootless engine, and no-cgroups is not set" "no-cgroups = true" "nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"
            else check toolkit ok "runtime nvidia" "$_needs"; fi ;;
        *)
            if [ -z "$_spec" ]; then check toolkit fail "neither runtime nor CDI" "$_needs" \
                "install nvidia-container-toolkit, then $(if [ "$1" = podman ]; then echo "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"; else echo "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"; fi)"
            elif [ "$1" = Docker ] && ! not_below "$ENGINE" 25; then check toolkit fail "CDI, which Docker $ENGINE does not read" "$_needs" "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
            else check toolkit ok "CDI $_spec" "$_needs"; fi ;;
    esac
}

check_bundle() { # sizes only: a missing or half-copied volume is named before anything else happens
    local _bad='' _v _bytes _sha _at _is _n
    while read -r _v _bytes _sha; do
        _at=$(where "$_v") || { _bad="$_bad $_v (missing)"; continue; }
        _is=$(stat -L -c %s "$_at" 2>/dev/null || echo 0)
        [ "$_is" = "$_bytes" ] || _bad="$_bad $_v ($_is of $_bytes bytes)"
    done <<ROWS
$(rows vol)
ROWS
    _n=$(rows vol | wc -l)
    if [ -z "$_bad" ]; then check bundle ok "$((_n)) volumes, all there" "$((_n)) volumes"
    else check bundle fail "wrong:$_bad" "$((_n)) whole volumes" "copy these again from the sender's disk, or --also DIR"; fi
}

check_base() { # of an update: the layers that it builds on
    local _first _rest
    [ "$KIND" = update ] || return 0
    _first=$(plan part) _first=${_first%% *}
    if [ "$START" -ge $((_first - 1)) ]; then check base ok "the layers that this update builds on are here" "$(plan since)"
    else check base fail "pruned or never installed: $(plan since)" "its $((_first - 1)) lowest layers, $START are here" "carry the full bundle instead"; fi
}

check_disk() {
    local _load=0 _peak=0 _size _first _last _k _diff _bytes _blob _rest _more=0 _free _mount _pfree _pmount
    while read -r _first _last _rest; do
        [ "$_last" -gt "$START" ] || continue
        _size=0
        while read -r _k _diff _bytes _blob _rest; do
            [ "$_k" -ge "$_first" ] && [ "$_k" -le "$_last" ] || continue
            _size=$((_size + _blob)) _load=$((_load + _bytes + ${CONTAINERD:+1}0 / 10 * _blob))
        done <<ROWS
$(rows layer)
ROWS
        [ "$_size" -le "$_peak" ] || _peak=$_size
    done <<ROWS
$(rows part)
ROWS
    _load=$((_load + _peak))
    [ -n "$MODELS" ] && while read -r _first _bytes _rest; do [ -z "$_first" ] || [ -d "$PREFIX/models/$_first" ] || _more=$((_more + _bytes)); done <<ROWS
$(rows model)
ROWS
    # shellcheck disable=SC2046
    set -- $(df_free "$(existing "$HOST$DATA_ROOT")") $(df_free "$(existing "$PREFIX")") $(df_free "$(existing "$HOST$DATA_ROOT")" -i)
    _free=$1 _mount=$2 _pfree=$3 _pmount=$4
    [ "$_mount" != "$_pmount" ] || { _load=$((_load + _more)); _more=0; }
    room "disk of the engine" "$DATA_ROOT" "$_free" "$_load" "the missing layers, and the largest part while it is unpacked"
    [ "$_more" = 0 ] || room "disk of the folder" "$PREFIX" "$_pfree" "$_more" "the base models"
    case $5 in *[!0-9]* | '' | 0) return 0 ;; esac # btrfs and overlay count none
    if [ "$START" -ge "$DEPTH" ] || [ "$5" -gt "$(plan files)" ]; then check inodes ok "$5 free" "$(plan files)"
    else check inodes fail "$5 free" "$(plan files)" "free inodes under $DATA_ROOT: docker system prune removes what no container uses"; fi
}

room() { # room NAME PATH FREE_KB BYTES WHAT_FOR
    case $3 in *[!0-9]* | '') check "$1" warn "cannot be seen from here: $2" "$(human "$4")" "make sure that $2 has $(human "$4") free: $5"; return ;; esac
    if [ $(($3 * 1024)) -ge "$4" ]; then check "$1" ok "$(human $(($3 * 1024))) free in $2" "$(human "$4")"
    else check "$1" fail "$(human $(($3 * 1024))) free in $2" "$(human "$4"): $5" "free $(human $(($4 - $3 * 1024))) there: docker system prune removes what no container uses"; fi
}

check_prefix() {
    local _at
    _at=$(existing "$PREFIX")
    if [ -w "$_at" ]; then check folder ok "$PREFIX" "a folder to write to"
    else check folder fail "$_at cannot be written to by $(id -un)" "a folder to write to" "run this as root, or choose another: --prefix DIR"; fi
}

check_memory() {
    local _kb=0 _key _value _rest _need
    while read -r _key _value _rest; do [ "$_key" != MemTotal: ] || _kb=$_value; done <"$HOST/proc/meminfo"
    _need=$(plan memory_bytes)
    if [ $((_kb * 1024)) -ge "$_need" ]; then check memory ok "$(human $((_kb * 1024)))" "$(human "$_need")"
    else check memory warn "$(human $((_kb * 1024)))" "$(human "$_need")" "training may be killed for memory: close other programs, or take a smaller base model"; fi
    # milktea-run gives its containers half of the memory as /dev/shm; several GPUs talk through it
    if [ $((_kb / 2)) -ge 1048576 ]; then check shm ok "$(human $((_kb * 512))) for containers" "1 GB"
    else check shm warn "$(human $((_kb * 512))) for containers" "1 GB" "train on one GPU: processes of several GPUs exchange data through /dev/shm"; fi
}

# "NAME, DRIVER, CAPABILITY, MEMORY, MIG" of each chosen GPU into "gpus"; what nvidia-smi says where it fails into "smi".
list_gpus() {
    local _line _w
    : >"$WORK/gpus"
    : >"$WORK/smi"
    if has nvidia-smi; then
        case $GPUS in all | none | MIG* | GPU*) set -- ;; *) set -- --id="$GPUS" ;; esac
        nvidia-smi "$@" --query-gpu=name,driver_version,compute_cap,memory.total,mig.mode.current --format=csv,noheader >"$WORK/smi" 2>&1 && mv "$WORK/smi" "$WORK/gpus" && : >"$WORK/smi"
        return
    fi
    [ -r "$HOST/proc/driver/nvidia/version" ] || return 0
    while read -r _line; do
        case $_line in NVRM*) for _w in $_line; do case $_w in [0-9]*.[0-9]*) echo "unknown GPU, $_w, ?, ?, ?" >>"$WORK/gpus"; return ;; esac; done ;; esac
    done <"$HOST/proc/driver/nvidia/version"
}

check_gpus() {
    local _g=0 _name _driver _cap _memory _mig _v _do _level _needs _floor
    list_gpus
    if [ "$CUDA" = none ] || [ "$GPUS" = none ]; then check driver ok "not needed" "none: the CPU trains"; return; fi
    _floor=$(plan driver) _needs="driver $_floor or newer for CUDA $CUDA"
    if [ -s "$WORK/smi" ]; then
        case $(one_line "$WORK/smi" 2000) in
            *"couldn't communicate"*) _do="modprobe nvidia; where that fails the module was not built for kernel $(uname -r): dkms status, then reinstall the driver or reboot" ;;
            *"version mismatch"*) _do="the driver was updated and the old module still runs: reboot this server" ;;
            *"No devices were found"*) _do="the driver runs and sees no GPU: lspci | grep -i nvidia, dmesg | grep NVRM; in a virtual machine check that the GPU is passed through" ;;
            *) _do="nvidia-smi must list the GPUs before a container can use one" ;;
        esac
        check driver fail "nvidia-smi says: $(one_line "$WORK/smi" 200)" "$_needs" "$_do"
    elif [ ! -s "$WORK/gpus" ]; then check driver fail "no NVIDIA driver" "$_needs" "install the NVIDIA driver $_floor or newer from this server's own package source"
    else
        while IFS=, read -r _name _driver _cap _memory _mig; do
            _driver=${_driver# } _cap=${_cap# }
            if [ "$_cap" = '?' ]; then
                if not_below "$_driver" "$_floor"; then check driver ok "$_driver, GPU unknown without nvidia-smi" "$_needs"
                else check driver fail "$_driver" "$_needs" "update the driver to $_floor or newer"; fi
                continue
            fi
            _v=$(judge "$_driver" "$_cap" "$(class_of "$_name")") _do=${_v#* } _v=${_v%% *}
            case $_v in native | minor) _level=ok ;; ptx) _level=warn ;; *) _level=fail _do="$_do; or leave this GPU out: --gpus with the numbers of the others" ;; esac
            check "gpu $_g" $_level "$_name, compute capability $_cap, driver $_driver: $_v" "$_needs" "$_do"
            case $_mig-$GPUS in *Enabled*-MIG*) ;; *Enabled*) check "mig $_g" warn "MIG is on" "one of its devices" "choose with --gpus MIG-..., which nvidia-smi -L lists" ;; esac
            _g=$((_g + 1))
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
        START=0
        load_parts
    fi
    is_ours || die 6 "the engine loaded $REF, and it is not the image of the signed plan: $(id_of "$REF"); its last words: $(one_line "$WORK/engine")" \
        "look at the engine's log and its disk ($DOCKER info), then run this again"
    drop_intermediate
}

load_parts() {
    local _first _last _files _tag _words
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
            _words=$(one_line "$WORK/engine")
            case $_words in
                *"no space left"*) die 6 "the engine ran out of disk while it loaded $_files: $_words" "free room in $DATA_ROOT ($DOCKER system df shows what takes it), then run this again" ;;
                *) die 6 "the engine did not take $_files, although its hash is right: $_words" "run this again; if it stays, look at the engine's log (journalctl -u docker)" ;;
            esac
        fi
    done 7<"$WORK/parts"
}

drop_intermediate() {
    local _image
    $DOCKER images --filter "reference=$REPO" --format '{{.Repository}}:{{.Tag}}' >"$WORK/tags" 2>/dev/null
    while read -r _image; do
        case ${_image#localhost/} in "$STEPS"-*) $DOCKER rmi "$_image" >/dev/null 2>&1 </dev/null ;; esac
    done <"$WORK/tags"
}

# After a refusal: nothing of this run stays, what was there before is untouched.
undo() {
    TOUCHED=
    drop_intermediate
    [ -n "$ID_BEFORE" ] || $DOCKER rmi -f "$REF" >/dev/null 2>&1
    rm -rf "$PREFIX"/models/.part-*
}

# --- prove, make current, take back ----------------------------------------------------------------------------------------

# inside OPTIONS... -- PROGRAM ARGUMENTS...: a container of the verified image: no network, nothing of the image writable.
inside() {
    local _label=''
    [ "$(cat /sys/fs/selinux/enforce 2>/dev/null)" != 1 ] || _label="--security-opt label=disable"
    # shellcheck disable=SC2086
    $DOCKER run --rm --network=none --read-only --tmpfs /tmp:rw,exec,mode=1777 --cap-drop=ALL --security-opt no-new-privileges $_label \
        --shm-size 1g -e HOME=/tmp "$@"
}

python() { # python TOOL ARGUMENTS...: a tool of this bundle, by the image's Python; sees the bundle and the prefix
    local _tool=$1 _d
    shift
    set -- --entrypoint "$(plan python)" "$REF" "/small/tools/$_tool" "$@"
    while read -r _d; do [ -z "$_d" ] || set -- -v "$_d:$_d:ro" "$@"; done <<ROWS
$BUNDLE
$ALSO
ROWS
    inside -i --user "$(id -u):$(id -g)" -v "$SMALL:/small:ro" -v "$PREFIX:$PREFIX" "$@"
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
    local _rc _expect=''
    say "prove the self-test runs with no network and a read-only image"
    [ "$CUDA" = none ] || [ "$GPUS" = none ] || _expect=--expect-gpu
    inside --entrypoint "$(plan python)" -v "$SMALL:/small:ro" "$REF" -c 'open("/small/PLAN")' >"$WORK/selftest" 2>&1 ||
        die 3 "the engine does not see $SMALL, or starts no container: $(one_line "$WORK/selftest")" "use an engine of this machine that may read $PREFIX (Docker from snap sees only the home folder: --prefix below it)"
    # shellcheck disable=SC2046
    set -- $(plan prove) $_expect
    _rc=$1
    shift
    set -- $(gpu_flags) -e "MILKTEA_MODELS=/run/milktea/models" -v "$PREFIX/models:/run/milktea/models:ro" -v "$SMALL/image.lock:/run/milktea/image.lock:ro" \
        --entrypoint "$_rc" "$REF" "$@"
    inside "$@" >"$WORK/selftest" 2>"$WORK/selftest.err"
    _rc=$?
    [ $_rc = 0 ] && return 0
    mkdir -p "$PREFIX/records"
    cat "$WORK/selftest" "$WORK/selftest.err" >"$PREFIX/records/selftest-failed-$ID.txt"
    die 7 "the self-test of $REF failed with exit code $_rc: $(tail -c 400 "$WORK/selftest.err" | tr '\n' ' ')" "send $PREFIX/records/selftest-failed-$ID.txt to the sender; the image that was current before still is"
}

state_of() { # state_of current|previous|release
    local _k _value
    [ -f "$PREFIX/state/$NAME" ] || return 1
    while read -r _k _value; do [ "$_k" = "$1" ] && { echo "$_value"; return 0; }; done <"$PREFIX/state/$NAME"
    return 1
}

write_state() { # write_state CURRENT PREVIOUS RELEASE: the file is the truth, the tags follow it
    printf 'current %s\nrelease %s\ngpus %s\nprevious %s\n' "$1" "$3" "$GPUS" "$2" >"$PREFIX/state/$NAME.part"
    mv "$PREFIX/state/$NAME.part" "$PREFIX/state/$NAME"
    [ -f "$PREFIX/state/default" ] || echo "$NAME" >"$PREFIX/state/default"
    $DOCKER tag "$1" "$REPO:current"
    [ -z "$2" ] || $DOCKER tag "$2" "$REPO:previous"
}

activate() {
    local _before _f
    _before=$(state_of current) || _before=
    [ "$_before" != "$REF" ] || _before=$(state_of previous) || _before=
    mkdir -p "$PREFIX/bin" "$PREFIX/records"
    for _f in tools docs; do # a whole new folder, then one rename
        rm -rf "$PREFIX/$_f.new" "$PREFIX/$_f.old"
        [ -d "$SMALL/$_f" ] && cp -r "$SMALL/$_f" "$PREFIX/$_f.new" || continue
        [ ! -d "$PREFIX/$_f" ] || mv "$PREFIX/$_f" "$PREFIX/$_f.old"
        mv "$PREFIX/$_f.new" "$PREFIX/$_f" && rm -rf "$PREFIX/$_f.old"
    done
    cp "$SMALL/image.lock" "$PREFIX/records/lock.part" && mv "$PREFIX/records/lock.part" "$PREFIX/records/image-$ID.lock"
    cp "$SMALL/tools/milktea-run" "$PREFIX/bin/milktea-run.part" && chmod 755 "$PREFIX/bin/milktea-run.part" && mv "$PREFIX/bin/milktea-run.part" "$PREFIX/bin/milktea-run"
    pin_sender
    write_state "$REF" "$_before" "$RELEASE"
    TOUCHED=
}

# What was verified, for the security officer: written by the image's Python, signed with this server's own key.
record() {
    local _key=$PREFIX/keys/server _file
    { print_facts; printf 'when %s\nwho %s\nsums %s\nsignature %s\nvolumes %s\nref %s\nid %s\nprevious %s\nforced %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(id -un)" \
        "$(sum_of <"$SMALL/SHA256SUMS")" "$SIGNED" "$(($(rows vol | wc -l)))" "$REF" "$(id_of "$REF")" "$(state_of previous)" "$FORCE"; } >"$WORK/facts"
    { cat "$WORK/facts"; echo selftest; cat "$WORK/selftest"; } | python installer.py record "$PREFIX" >"$WORK/record.err" 2>&1 || say "note  no record: $(one_line "$WORK/record.err")"
    has ssh-keygen || return 0
    [ -f "$_key" ] || ssh-keygen -q -t ecdsa -b 256 -m PEM -N '' -C "milktea server $(uname -n)" -f "$_key" </dev/null
    for _file in "$PREFIX/INSTALL-RECORD.json" "$PREFIX/EVIDENCE.html"; do
        rm -f "$_file.sig"
        [ ! -f "$_file" ] || ssh-keygen -q -Y sign -f "$_key" -n milktea-evidence "$_file" 2>/dev/null </dev/null
    done
}

rollback() {
    local _now _back
    _now=$(state_of current) || die 2 "nothing of $NAME is installed in $PREFIX" "sh INSTALL.sh install"
    _back=$(state_of previous) && [ -n "$_back" ] || die 2 "there is no image before $_now" "$PREFIX/bin/milktea-run status shows what is installed"
    [ -n "$(id_of "$_back")" ] || die 6 "$_back is no longer on the server" "install its bundle again"
    write_state "$_back" "$_now" "$(state_of release)"
    say "current $_back"
    say "before  $_now (sh INSTALL.sh rollback goes forward again)"
}

# --- the story -------------------------------------------------------------------------------------------------------------

install() {
    local _older
    _older=$(state_of release) || _older=0
    [ "$RELEASE" -ge "$_older" ] || [ -n "$OLDER" ] || die 5 "this bundle is release $RELEASE, and $_older is installed: an older one may bring back what was mended" "ask the sender for the newest; or add --allow-older"
    preflight
    print_checks
    if [ "$FAILED" -gt 0 ]; then
        [ -n "$FORCE" ] || die 3 "$FAILED of the checks above say no" "mend what they name, in that order, and run this again (--force goes on all the same)"
        say "note  going on although $FAILED checks say no (--force)"
    fi
    [ -n "$ENGINE" ] || die 3 "no Docker engine" "see the check named engine"
    lock
    ID_BEFORE=$(id_of "$REF")
    say "verify every volume, before anything is loaded"
    if [ -n "$MODELS" ]; then require_volumes 'parts/*' 'models/*'; else require_volumes 'parts/*'; fi
    load_image
    mkdir -p "$PREFIX/models"
    TOUCHED=yes
    if [ -n "$MODELS" ] && [ -n "$(plan model)" ]; then
        python installer.py models "$PREFIX" <"$WORK/good" >&3 2>"$WORK/models.err" || die 4 "a base model does not arrive whole: $(one_line "$WORK/models.err")" "check the disk of $PREFIX for room and errors, then run this again"
    fi
    prove
    activate
    record
    say "DONE  $REF is current; try: $PREFIX/bin/milktea-run check"
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

main() {
    while [ $# -gt 0 ]; do
        case $1 in
            install | preflight | verify | rollback) COMMAND=$1 ;;
            --prefix | --also | --key | --gpus)
                [ $# -ge 2 ] || { usage >&2; exit 2; }
                case $1 in
                    --prefix) PREFIX=$2 ;;
                    --also) ALSO="$ALSO$(cd "$2" && pwd)
" ;;
                    --key) KEY=$2; case $2 in SHA256:*) ;; *) [ -f "$2" ] || { echo "REFUSED: --key $2 does not exist" >&2; exit 2; } ;; esac ;;
                    --gpus) GPUS=$2; case $2 in *[!A-Za-z0-9,-]* | '') usage >&2; exit 2 ;; esac ;;
                esac
                shift ;;
            --new-sender) NEW_SENDER=yes ;;
            --require-signature) NEED_SIGNATURE=yes ;;
            --allow-older) OLDER=yes ;;
            --facts) FACTS=yes ;;
            --no-models) MODELS= ;;
            --force) FORCE=yes ;;
            -h | --help) usage; exit 0 ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
    [ -z "$NEW_SENDER" ] || [ -n "$KEY" ] || { echo "REFUSED: --new-sender wants --key" >&2; exit 2; }
    case $PREFIX in /*) ;; *) PREFIX=$(pwd)/$PREFIX ;; esac
    if [ -n "$FACTS" ]; then exec 3>&2; else exec 3>&1; fi
    ID_BEFORE=''
    WORK=$(mktemp -d) || exit 3
    trap leave EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    copy_small
    check_signature
    verify_small
    read_plan
    case $COMMAND in
        preflight)
            preflight
            [ -z "$FACTS" ] || print_facts
            print_checks
            [ "$FAILED" = 0 ] || exit 3 ;;
        verify)
            require_volumes 'parts/*' 'models/*'
            say "whole: $(($(rows vol | wc -l))) volumes, signature $SIGNED" ;;
        *) $COMMAND ;;
    esac
}

# The whole script is read before its last line runs it: a damaged one does nothing.
main "$@"
exit $?
