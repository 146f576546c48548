#!/bin/sh
# Trains, talks and scores inside the installed image: no network, read-only image, GPUs, your own user, shared memory for
# several GPUs. The job files are the same as for renting. Needs sh, docker and coreutils.
# shellcheck shell=dash
set -u

usage() {
    cat <<'TEXT'
usage: milktea-run COMMAND ...
  train JOB.toml [--gpus N] [--run NAME]   train; the same NAME again goes on from its last checkpoint
  chat RUN [PROMPT]                        talk to what a run made (RUN: a name under ./milktea, or its folder)
  evaluate RUN [DATA.json]                 BLEU-4, ROUGE and exact match on held-out rows (the job's own, or DATA.json)
  launch ARGUMENTS...                      accelerate launch ARGUMENTS, in the current folder
  models                                   the base models installed here
  check                                    the image's self-test
  shell                                    a shell in the image
settings by environment: MILKTEA_PREFIX (where INSTALL.sh put things), MILKTEA_IMAGE (name:tag; else the current one),
  MILKTEA_RUNS (./milktea), MILKTEA_SHM (half of the memory), MILKTEA_GPUS (all; none; a number; or device=0,1),
  MILKTEA_CUDA_COMPAT (a folder of NVIDIA's cuda-compat package), MILKTEA_DRY_RUN=1 (print the docker commands)
TEXT
}

refuse() {
    printf 'REFUSED: %s\n  do this: %s\n' "$1" "$2" >&2
    exit 2
}

# bin/milktea-run lies in PREFIX/bin.
PREFIX=${MILKTEA_PREFIX:-$(cd "$(dirname "$0")/.." && pwd)}
DOCKER=${DOCKER:-docker}
RUNS=${MILKTEA_RUNS:-$(pwd)/milktea}
GPUS=${MILKTEA_GPUS:-all}
DRY=${MILKTEA_DRY_RUN:-}

current_image() {
    local _name _key _ref
    if [ -n "${MILKTEA_IMAGE:-}" ]; then
        echo "$MILKTEA_IMAGE"
        return
    fi
    _name=$(cat "$PREFIX/state/default" 2>/dev/null) || refuse "no image is installed in $PREFIX" "sh INSTALL.sh, or MILKTEA_PREFIX=the --prefix that was used"
    while read -r _key _ref; do
        if [ "$_key" = current ]; then echo "$_ref"; fi
    done <"$PREFIX/state/$_name"
}

# GPUs by the toolkit's runtime, or by CDI; none where the image or the server has none.
gpu_flags() {
    local _cdi _list _g
    [ "$GPUS" = none ] && return
    case $($DOCKER info --format '{{json .Runtimes}}' 2>/dev/null) in
        *nvidia*)
            case $GPUS in device=*) echo "--gpus \"$GPUS\"" ;; *) echo "--gpus $GPUS" ;; esac
            return ;;
    esac
    for _cdi in /etc/cdi/*nvidia* /var/run/cdi/*nvidia*; do
        [ -f "$_cdi" ] || continue
        case $GPUS in
            all) echo "--device nvidia.com/gpu=all" ;;
            device=*) _list=${GPUS#device=}; while [ -n "$_list" ]; do echo "--device nvidia.com/gpu=${_list%%,*}"; case $_list in *,*) _list=${_list#*,} ;; *) _list= ;; esac; done ;;
            *) _g=0; while [ "$_g" -lt "$GPUS" ]; do echo "--device nvidia.com/gpu=$_g"; _g=$((_g + 1)); done ;;
        esac
        return
    done
}

shared_memory() {
    local _key _kb _unit
    if [ -n "${MILKTEA_SHM:-}" ]; then
        echo "$MILKTEA_SHM"
        return
    fi
    while read -r _key _kb _unit; do
        [ "$_key" = MemTotal: ] && echo "$((_kb / 2))k" && return
    done </proc/meminfo
}

# Where the image's Python keeps what it compiled: without it each start compiles 3,000 modules anew, which takes 10 seconds of a
# processor. One folder an image, because all files of all images bear one time, by which Python tells old from new.
python_cache() {
    local _id
    _id=$($DOCKER image inspect --format '{{.Id}}' "$1" 2>/dev/null) && [ -n "$_id" ] && printf '%s/cache/python-%.12s\n' "$RUNS" "${_id#sha256:}"
}

# inside EXTRA... -- PROGRAM ARGUMENTS...: the one way into the image. EXTRA are more docker options.
inside() {
    local _gpus _image _options _i _program _a _python
    _image=$(current_image) || exit 2
    _python=$(python_cache "$_image")
    mkdir -p "$RUNS/cache"
    _options="--rm --init --network=none --read-only --tmpfs /tmp:rw,exec,mode=1777 --cap-drop=ALL --security-opt no-new-privileges"
    _gpus=$(gpu_flags)
    # NVIDIA's advice for NCCL; engines without the right to raise limits refuse it, so only where there are GPUs
    [ -n "$_gpus" ] && _options="$_options --ulimit memlock=-1 --ulimit stack=67108864"
    _options="$_options --shm-size $(shared_memory) $_gpus"
    # rootless engines map root to the user already
    case $($DOCKER info --format '{{json .SecurityOptions}}' 2>/dev/null) in *rootless*) ;; *) _options="$_options --user $(id -u):$(id -g)" ;; esac
    [ "$(cat /sys/fs/selinux/enforce 2>/dev/null)" = 1 ] && _options="$_options --security-opt label=disable"
    [ -t 0 ] && [ -t 1 ] && _options="$_options -t"
    _i=$#
    _program=
    while [ "$_i" -gt 0 ]; do # rotate the arguments: EXTRA first, then the image, then the program
        _a=$1
        shift
        _i=$((_i - 1))
        if [ "$_a" = -- ] && [ -z "$_program" ]; then
            _program=$1
            shift
            _i=$((_i - 1))
            set -- "$@" -i -e HOME=/tmp -e USER=milktea -e LOGNAME=milktea -e PYTHONPATH=/tools -e "MILKTEA_MODELS=$PREFIX/models" \
                -e "TRITON_CACHE_DIR=$RUNS/cache/triton" -e "TORCHINDUCTOR_CACHE_DIR=$RUNS/cache/inductor" \
                ${_python:+-e "PYTHONPYCACHEPREFIX=$_python"} \
                -v "$PREFIX/tools:/tools:ro" -v "$PREFIX/models:$PREFIX/models:ro" -v "$RUNS:$RUNS" --entrypoint "$_program" "$_image"
        else
            set -- "$@" "$_a"
        fi
    done
    if [ -n "${MILKTEA_CUDA_COMPAT:-}" ]; then set -- -v "$MILKTEA_CUDA_COMPAT:/cuda-compat:ro" -e LD_LIBRARY_PATH=/cuda-compat "$@"; fi
    if [ -n "$DRY" ]; then
        echo "docker run" $_options "$@"
        return
    fi
    # shellcheck disable=SC2086
    $DOCKER run $_options "$@"
}

absolute() { (cd "$(dirname "$1")" 2>/dev/null && printf '%s/%s\n' "$(pwd)" "$(basename "$1")"); }

train() {
    local _job _processes _run _folder _named _old_ifs _p _code
    [ $# -ge 1 ] || { usage >&2; exit 2; }
    _job=$(absolute "$1") && [ -f "$_job" ] || refuse "$1 does not exist" "ls *.toml"
    shift
    _processes='' _run=''
    while [ $# -gt 0 ]; do
        case $1 in
            --gpus) _processes=$2; GPUS=$2; shift 2 || exit 2 ;;
            --run) _run=$2; shift 2 || exit 2 ;;
            *) usage >&2; exit 2 ;;
        esac
    done
    [ -n "$_run" ] || { _run=$(basename "$_job" .toml)-$(date -u +%Y%m%d-%H%M%S); }
    _folder=$(dirname "$_job")
    # first ask which files the job names, then mount exactly these, read-only, under the paths that they have here
    _named=$(DRY='' GPUS=none inside -v "$_folder:$_folder:ro" -- python3 /tools/job_from_toml.py paths "$_job") || exit $?
    set -- -v "$_folder:$_folder:ro"
    _old_ifs=$IFS
    IFS='
'
    for _p in $_named; do
        case $_p in "$_folder"/*) continue ;; esac
        [ -e "$_p" ] && set -- "$@" -v "$_p:$_p:ro"
    done
    IFS=$_old_ifs
    mkdir -p "$RUNS/$_run"
    if [ -f "$RUNS/$_run/job.json" ]; then
        echo "run $_run goes on from its last checkpoint"
    else
        GPUS=none inside "$@" -- python3 /tools/job_from_toml.py run "$_job" "$RUNS/$_run" $_processes || exit $?
    fi
    echo "run $_run: $RUNS/$_run/events.jsonl"
    inside "$@" -w "$RUNS/$_run" -- python3 -m trainer.launch job.json
    _code=$?
    echo "$_code" >"$RUNS/$_run/exit_code.new" && mv "$RUNS/$_run/exit_code.new" "$RUNS/$_run/exit_code"
    [ "$_code" = 0 ] && echo "adapter: $RUNS/$_run/result/adapter.zip"
    return "$_code"
}

# The self-test compares versions with the lock that was installed with this image.
check() {
    local _image _lock
    _image=$(current_image) || exit 2
    _lock=$PREFIX/records/image-${_image##*:}.lock
    [ -f "$_lock" ] || _lock=
    inside ${_lock:+-v "$_lock:/run/milktea/image.lock:ro"} -- python3 -m trainer.checkup "$@"
}

# The folder of a run by its name or path; what is not under RUNS is mounted.
run_folder() {
    if [ -d "$RUNS/$1" ]; then echo "$RUNS/$1"
    elif [ -d "$1" ]; then (cd "$1" && pwd)
    else refuse "there is no run $1 under $RUNS" "ls $RUNS"; fi
}

# The base model of a run, where it is a folder of this server and not among the installed models, which are mounted always.
model_folder() {
    local _m
    _m=$(readlink "$1/model") || return 0
    case $_m in "$PREFIX/models"/*) ;; *) [ ! -d "$_m" ] || echo "$_m" ;; esac
}

chat() {
    local _at _model
    [ $# -ge 1 ] || { usage >&2; exit 2; }
    _at=$(run_folder "$1") || exit 2
    shift
    if [ $# -gt 0 ]; then set -- --prompt "$*"; fi
    _model=$(model_folder "$_at")
    inside ${_model:+-v "$_model:$_model:ro"} -v "$_at:$_at" -w "$_at" -- python3 -m trainer.serve.chat "$_at/result/adapter.zip" --base "$_at/model" "$@"
}

evaluate() {
    local _at _data _model
    [ $# -ge 1 ] || { usage >&2; exit 2; }
    _at=$(run_folder "$1") || exit 2
    shift
    _model=$(model_folder "$_at")
    if [ $# -ge 1 ]; then
        _data=$(absolute "$1") && [ -f "$_data" ] || refuse "$1 does not exist" "ls"
        inside ${_model:+-v "$_model:$_model:ro"} -v "$_at:$_at" -v "$_data:$_data:ro" -w "$_at" -- python3 -m trainer.eval.score "$_at" "$_data"
    else
        inside ${_model:+-v "$_model:$_model:ro"} -v "$_at:$_at" -w "$_at" -- python3 -m trainer.eval.score "$_at"
    fi
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
    train | chat | evaluate) $command "$@" ;;
    launch) inside -v "$(pwd):$(pwd)" -w "$(pwd)" -- accelerate launch "$@" ;;
    check) check "$@" ;;
    shell) inside -v "$(pwd):$(pwd)" -w "$(pwd)" -- sh "$@" ;;
    models) for _m in "$PREFIX"/models/by-name/* "$PREFIX"/models/by-name/*/*; do [ -f "$_m/config.json" ] && echo "${_m#"$PREFIX"/models/by-name/}"; done; : ;;
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
