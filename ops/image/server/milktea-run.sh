#!/bin/sh
# Trains, talks and scores inside the installed image: no network, read-only image, GPUs, your own user, shared memory for
# several GPUs. The job files are the same as for renting. Needs sh, docker and coreutils.
# shellcheck shell=dash
set -u

usage() {
    cat <<'TEXT'
usage: milktea-run COMMAND ...
  train JOB.toml [--gpus N|0,1] [--run NAME] [--detach] [--share]
                                           train and show the log; closing the terminal or Ctrl-C leaves it training.
                                           The same NAME again goes on from its last checkpoint
  status                                   the runs here, and who has which GPU
  logs [-f] RUN                            what a run says; -f follows it
  stop RUN                                 end a run after a checkpoint
  chat RUN [PROMPT]                        talk to what a run made (RUN: a name under ./milktea, or its folder)
  serve RUN [RUN2 ...]                     what runs made, by OpenAI's interface and in the browser, until Ctrl-C
  evaluate RUN [DATA.json]                 BLEU-4, ROUGE and exact match on held-out rows (the job's own, or DATA.json)
  merge RUN [bf16|fp16|fp32]               base and adapter as one model, in the run's folder merged-bf16, with a certificate
  launch ARGUMENTS...                      accelerate launch ARGUMENTS, in the current folder
  models                                   the base models installed here
  check                                    the image's self-test
  shell                                    a shell in the image
  images                                   what is installed, with sizes
  use NAME                                 which of several installed images the commands use
  rollback [NAME]                          the image before; once more goes forward again
  prune                                    remove the images before the previous one, and caches here
  uninstall                                remove every image; PREFIX with models, records and tools is then yours to delete
settings by environment: MILKTEA_PREFIX (where INSTALL.sh put things), MILKTEA_IMAGE (name:tag; else the current one),
  MILKTEA_RUNS (./milktea), MILKTEA_SHM (half of the memory), MILKTEA_GPUS (all; none; a number; or device=0,1),
  MILKTEA_CUDA_COMPAT (a folder of NVIDIA's cuda-compat package), MILKTEA_DRY_RUN=1 (print the docker commands);
  of serve: MILKTEA_LISTEN (127.0.0.1:8014), MILKTEA_NAME (by which browsers reach it), MILKTEA_CERTIFICATE (a PEM file)
TEXT
}

refuse() {
    printf 'REFUSED: %s\n  do this: %s\n' "$1" "$2" >&2
    exit 2
}

# bin/milktea-run lies in PREFIX/bin.
PREFIX=${MILKTEA_PREFIX:-$(cd "$(dirname "$0")/.." && pwd)}
DOCKER=${DOCKER:-$(if command -v docker >/dev/null 2>&1 || ! command -v podman >/dev/null 2>&1; then echo docker; else echo podman; fi)}
RUNS=${MILKTEA_RUNS:-$(pwd)/milktea}
GPUS=${MILKTEA_GPUS:-all}
DRY=${MILKTEA_DRY_RUN:-}
DETACHED='' NAMED='' NETWORK=none

current_image() {
    local _name _key _ref
    [ -z "${MILKTEA_IMAGE:-}" ] || { echo "$MILKTEA_IMAGE"; return; }
    _name=$(cat "$PREFIX/state/default" 2>/dev/null) || refuse "no image is installed in $PREFIX" "sh INSTALL.sh, or MILKTEA_PREFIX=the --prefix that was used"
    while read -r _key _ref; do [ "$_key" != current ] || echo "$_ref"; done <"$PREFIX/state/$_name"
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
    [ -z "${MILKTEA_SHM:-}" ] || { echo "$MILKTEA_SHM"; return; }
    while read -r _key _kb _unit; do [ "$_key" != MemTotal: ] || echo "$((_kb / 2))k"; done </proc/meminfo
}

# Where the image's Python keeps what it compiled: without it each start compiles 3,000 modules anew, which takes 10 seconds of a
# processor. One folder an image, because all files of all images bear one time, by which Python tells old from new.
python_cache() {
    local _id
    _id=$($DOCKER image inspect --format '{{.Id}}' "$1" 2>/dev/null) && [ -n "$_id" ] && printf '%s/cache/python-%.12s\n' "$RUNS" "${_id#sha256:}"
}

# inside EXTRA... -- PROGRAM ARGUMENTS...: the one way into the image. EXTRA are more docker options.
inside() {
    local _gpus _image _options _init _i _program _a _python _zone
    _image=$(current_image) || exit 2
    _python=$(python_cache "$_image")
    mkdir -p "$RUNS/cache"
    # podman's --init is a program of its own, catatonit, which is not everywhere; run_job.py does without
    _init=--init
    case $DOCKER in *podman*) [ -x "$(command -v catatonit)" ] || [ -x /usr/libexec/podman/catatonit ] || _init='' ;; esac
    _options="--rm $_init --network=$NETWORK --read-only --tmpfs /tmp:rw,exec,mode=1777 --cap-drop=ALL --security-opt no-new-privileges"
    _gpus=$(gpu_flags)
    # NVIDIA's advice for NCCL; engines without the right to raise limits refuse it, so only where there are GPUs
    [ -n "$_gpus" ] && _options="$_options --ulimit memlock=-1 --ulimit stack=67108864"
    _options="$_options --shm-size $(shared_memory) $_gpus"
    # rootless engines map root to the user already
    case "$($DOCKER info --format '{{json .SecurityOptions}}' 2>/dev/null)$($DOCKER info --format '{{.Host.Security.Rootless}}' 2>/dev/null)" in *rootless* | *true*) ;; *) _options="$_options --user $(id -u):$(id -g)" ;; esac
    [ "$(cat /sys/fs/selinux/enforce 2>/dev/null)" = 1 ] && _options="$_options --security-opt label=disable"
    if [ -n "$DETACHED" ]; then _options="$_options -d"; elif [ -t 0 ] && [ -t 1 ]; then _options="$_options -i -t"; else _options="$_options -i"; fi
    if [ -n "$NAMED" ]; then _options="$_options --name $NAMED --label milktea.run=$NAMED --label milktea.gpus=${GPUS#device=}"; fi
    _zone=$(readlink /etc/localtime) && _options="$_options -e TZ=${_zone##*zoneinfo/}"
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
            set -- "$@" -e HOME=/tmp -e USER=milktea -e LOGNAME=milktea -e PYTHONPATH=/tools -e "MILKTEA_MODELS=$PREFIX/models" \
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

# A run's folder and container have names of a-z, 0-9 and -; other names keep what they can, and a few digits of themselves.
run_name() {
    local _plain
    _plain=$(printf %s "$1" | tr 'A-Z_. ' 'a-z---' | tr -cd 'a-z0-9-' | sed 's/^-*//' | cut -c 1-48)
    if [ "$_plain" = "$1" ] && [ ${#1} -ge 3 ]; then echo "$1"; else echo "${_plain:-run}-$(printf %s "$1" | sha256sum | cut -c 1-6)"; fi
}

container_of() { printf 'milktea-%s-%s' "$1" "$(printf %s "$RUNS" | sha256sum | cut -c 1-8)"; } # container_of RUN: one a folder of runs

runs_now() { $DOCKER ps --filter label=milktea.run --format '{{.Label "milktea.run"}} {{.Label "milktea.gpus"}}' 2>/dev/null; } # NAME GPUS

# lease_gpus SHARE: GPUs that no run has. Two users of one server do not get the same card.
lease_gpus() {
    local _name _theirs _taken='' _free='' _n _all
    [ "$GPUS" != none ] && [ -n "$(gpu_flags)" ] || return 0
    command -v nvidia-smi >/dev/null 2>&1 || return 0
    _all=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null) || return 0
    runs_now >"$RUNS/.leases.$$"
    while read -r _name _theirs; do
        if [ "$_theirs" = all ]; then _theirs=$(echo "$_all" | tr '\n' ,); fi
        [ "$_theirs" = none ] || _taken="$_taken,$_theirs"
    done <"$RUNS/.leases.$$"
    rm -f "$RUNS/.leases.$$"
    for _n in $_all; do case $_taken, in *,"$_n",*) ;; *) _free="$_free $_n" ;; esac; done
    case $GPUS in
        all) [ -n "$1" ] || [ -z "$_taken" ] || refuse "GPUs$(echo "$_taken" | tr , ' ') are in use by other runs" "--gpus N takes N free ones (free:${_free:- none}), milktea-run status says whose, --share takes all the same" ;;
        device=*)
            [ -n "$1" ] || for _n in $(echo "${GPUS#device=}" | tr , ' '); do
                case $_taken, in *,"$_n",*) refuse "GPU $_n is in use by another run" "choose another (free:${_free:- none}), or --share" ;; esac
            done ;;
        *)
            # shellcheck disable=SC2086
            set -- "$GPUS" $_free
            [ $# -gt "$1" ] || refuse "$1 GPUs are wanted, free are:${_free:- none}" "wait, milktea-run status says for whom; or --share with --gpus all"
            _n=$1 _free=''
            while [ "$_n" -gt 0 ]; do shift; _free="$_free${_free:+,}$1"; _n=$((_n - 1)); done
            GPUS=device=$_free ;;
    esac
}

train() {
    local _job _processes='' _run='' _folder _named _p _at _quiet='' _share=''
    [ $# -ge 1 ] || { usage >&2; exit 2; }
    _job=$(absolute "$1") && [ -f "$_job" ] || refuse "$1 does not exist" "ls *.toml"
    shift
    while [ $# -gt 0 ]; do
        case $1-${2:-} in --gpus- | --run-) refuse "$1 wants a value" "milktea-run --help" ;; esac
        case $1 in
            --gpus)
                case $2 in *,*) GPUS=device=$2 _processes=$(echo "$2" | tr , '\n' | wc -l) ;; *) GPUS=$2 _processes=$2 ;; esac
                shift 2 || exit 2 ;;
            --run) _run=$2; shift 2 || exit 2 ;;
            --detach) _quiet=yes; shift ;; --share) _share=yes; shift ;;
            *) usage >&2; exit 2 ;;
        esac
    done
    _run=$(run_name "${_run:-$(basename "$_job" .toml)-$(date +%Y%m%d-%H%M%S)}")
    _at=$RUNS/$_run
    _folder=$(dirname "$_job")
    if [ -f "$_at/job.toml" ] && [ "$(sha256sum <"$_job")" != "$(sha256sum <"$_at/job.toml")" ]; then
        refuse "run $_run was begun with another $(basename "$_job"): $_at/job.toml" "give the changed job a new name with --run, or restore the old one"
    fi
    case " $(runs_now | tr '\n' ' ')" in *" $(container_of "$_run") "*) refuse "run $_run trains already" "milktea-run logs -f $_run" ;; esac
    # first ask which files the job names, then mount exactly these, read-only, under the paths that they have here
    _named=$(DRY='' GPUS=none inside -v "$_folder:$_folder:ro" -- python3 /tools/job_from_toml.py paths "$_job") || exit $?
    set -- -v "$_folder:$_folder:ro"
    while IFS= read -r _p; do
        case $_p in "$_folder"/*) continue ;; esac
        [ ! -e "$_p" ] || set -- "$@" -v "$_p:$_p:ro"
    done <<LIST
$_named
LIST
    if [ -f "$_at/job.json" ]; then
        echo "run $_run goes on from its last checkpoint"
    else
        [ -n "$DRY" ] || mkdir -p "$_at"
        # shellcheck disable=SC2086
        GPUS=none inside "$@" -- python3 /tools/job_from_toml.py run "$_job" "$_at" $_processes || { rmdir "$_at" 2>/dev/null; exit 2; }
        [ -n "$DRY" ] || { cp "$_job" "$_at/job.toml" && current_image >"$_at/image"; }
    fi
    lease_gpus "$_share"
    NAMED=$(container_of "$_run") DETACHED=yes
    _p=$(inside "$@" -w "$_at" -- python3 /tools/run_job.py 2>&1) || { echo "$_p" >&2; exit 1; }
    [ -z "$DRY" ] || { echo "$_p"; return; }
    echo "run $_run: $_at    (milktea-run logs -f $_run, milktea-run stop $_run)"
    [ -z "$_quiet" ] || return 0
    trap 'echo; echo "run $_run goes on: milktea-run logs -f $_run"; exit 0' INT HUP
    $DOCKER logs -f "$NAMED" 2>&1
    ended "$_run"
}

ended() { # ended RUN: how it ended; waits for the container to be gone
    local _code
    while [ -n "$($DOCKER ps -q --filter "name=^$(container_of "$1")\$" 2>/dev/null)" ]; do sleep 1; done
    _code=$(cat "$RUNS/$1/exit_code" 2>/dev/null) || refuse "run $1 ended without an exit code: the engine or this server stopped it" "milktea-run train JOB.toml --run $1 goes on from its last checkpoint"
    [ "$_code" != 0 ] || echo "adapter: $RUNS/$1/result/adapter.zip"
    return "$_code"
}

status() {
    local _at _name _now _state
    _now=$(runs_now)
    for _at in "$RUNS"/*/job.json; do
        [ -f "$_at" ] || continue
        _at=${_at%/job.json} _name=${_at##*/}
        case "$_now" in
            *"$(container_of "$_name") "*) _state="trains" ;;
            *) if [ -f "$_at/exit_code" ]; then _state="ended with $(cat "$_at/exit_code")"; else _state="was interrupted"; fi ;;
        esac
        printf '%-40s %-18s %s\n' "$_name" "$_state" "$(cat "$_at/image" 2>/dev/null)"
    done
    [ -z "$_now" ] || printf 'GPUs in use on this server:\n%s\n' "$_now"
}

logs() {
    local _follow='' _at
    if [ "${1:-}" = -f ]; then _follow=yes; shift; fi
    _at=$(run_folder "${1:-}") || exit 2
    if [ -n "$_follow" ] && [ -n "$($DOCKER ps -q --filter "name=^$(container_of "${_at##*/}")\$" 2>/dev/null)" ]; then
        $DOCKER logs -f "$(container_of "${_at##*/}")" 2>&1
        ended "${_at##*/}"
    else cat "$_at/log.txt"; fi
}

stop() {
    local _at
    _at=$(run_folder "${1:-}") || exit 2
    $DOCKER stop -t 600 "$(container_of "${_at##*/}")" >/dev/null 2>&1 || refuse "run $1 does not train" "milktea-run status"
    echo "run $1 stopped; milktea-run train JOB.toml --run $1 goes on"
}

installed() { # of every image that INSTALL.sh brought: NAME CURRENT PREVIOUS
    local _file _key _value _now _back
    for _file in "$PREFIX"/state/*; do
        case ${_file##*/} in default | lock | work.* | '*') continue ;; esac
        _now='' _back=''
        while read -r _key _value; do case $_key in current) _now=$_value ;; previous) _back=$_value ;; esac; done <"$_file"
        echo "${_file##*/} $_now ${_back:--}"
    done
}

tags_of() { $DOCKER images --filter "reference=${1%:*}" --format "$2"; } # tags_of IMAGE FORMAT: every tag of its repository

images() {
    local _name _now _back
    installed | while read -r _name _now _back; do
        echo "$_name: current $_now, previous $_back"
        tags_of "$_now" '  {{.Repository}}:{{.Tag}} {{.Size}}'
    done
    du -sh "$PREFIX/models" "$RUNS/cache" 2>/dev/null
}

prune() {
    local _name _now _back _image _size
    installed | while read -r _name _now _back; do
        tags_of "$_now" '{{.Repository}}:{{.Tag}} {{.Size}}' | while read -r _image _size; do
            case /$_image in # podman puts docker.io/ or localhost/ before a name
                */"$_now" | */"$_back" | */"${_now%:*}:current" | */"${_now%:*}:previous") ;;
                *) $DOCKER rmi "$_image" >/dev/null 2>&1 </dev/null && echo "removed $_image ($_size with what it shares)" ;;
            esac
        done
    done
    [ ! -d "$RUNS/cache" ] || { du -sh "$RUNS/cache"; rm -rf "$RUNS/cache"; }
}

rollback() { # rollback [NAME]: the image before; once more goes forward again
    local _name=${1:-$(cat "$PREFIX/state/default")} _file _now _back
    set -- $(installed | while read -r _n _now _back; do [ "$_n" != "$_name" ] || echo "$_now $_back"; done)
    _file=$PREFIX/state/$_name _now=${1:-} _back=${2:--}
    [ "$_back" != - ] || refuse "there is no image of $_name before ${_now:-the first}" "milktea-run images shows what is installed"
    $DOCKER image inspect "$_back" >/dev/null 2>&1 || refuse "$_back is no longer on this server" "install its bundle again"
    { echo "current $_back"; echo "previous $_now"; while read -r _key _value; do case $_key in current | previous) ;; *) echo "$_key $_value" ;; esac; done <"$_file"; } >"$_file.part"
    mv "$_file.part" "$_file" && $DOCKER tag "$_back" "${_back%:*}:current" && $DOCKER tag "$_now" "${_now%:*}:previous" && echo "current $_back"
}

uninstall() {
    local _name _now _back _image
    [ -z "$(runs_now)" ] || refuse "runs train on this server" "milktea-run stop RUN, then again"
    installed | while read -r _name _now _back; do
        tags_of "$_now" '{{.Repository}}:{{.Tag}}' | while read -r _image; do
            $DOCKER rmi -f "$_image" >/dev/null 2>&1 </dev/null && echo "removed $_image"
        done
        rm -f "$PREFIX/state/$_name"
    done
    rm -f "$PREFIX/state/default"
    echo "models, records, keys and tools are left: rm -r $PREFIX"
}

# The self-test compares versions with the lock that was installed with this image.
check() {
    local _image _lock
    _image=$(current_image) || exit 2
    _lock=$PREFIX/records/image-${_image##*:}.lock
    [ -f "$_lock" ] || _lock=
    inside ${_lock:+-v "$_lock:/run/milktea/image.lock:ro"} -- python3 -m trainer.checkup "$@"
}

run_folder() { # run_folder RUN: its folder, by its name, what --run called it, or its path
    [ -n "${1:-}" ] || { usage >&2; exit 2; }
    if [ -d "$RUNS/$1" ]; then echo "$RUNS/$1"
    elif [ -d "$RUNS/$(run_name "$1")" ]; then echo "$RUNS/$(run_name "$1")"
    elif [ -d "$1" ]; then (cd "$1" && pwd)
    else refuse "there is no run $1 under $RUNS" "milktea-run status"; fi
}

# The base model of a run, where it is a folder of this server and not among the installed models, which are mounted always.
model_folder() {
    local _m
    _m=$(readlink "$1/model") || return 0
    case $_m in "$PREFIX/models"/*) ;; *) [ ! -d "$_m" ] || echo "$_m" ;; esac
}

# on_run FOLDER FILE MODULE ARGUMENTS...: a module of the trainer over what a run made; FILE is one more to read, or ''.
# What a result can do is one function here that calls this.
on_run() {
    local _at=$1 _file=$2 _module=$3 _model
    shift 3
    _model=$(model_folder "$_at")
    inside ${_model:+-v "$_model:$_model:ro"} ${_file:+-v "$_file:$_file:ro"} -v "$_at:$_at" -w "$_at" -- python3 -m "$_module" "$@"
}

chat() {
    local _at
    _at=$(run_folder "${1:-}") || exit 2
    shift
    if [ $# -gt 0 ]; then set -- --prompt "$*"; fi
    on_run "$_at" '' trainer.serve.chat "$_at/result/adapter.zip" --base "$_at/model" "$@"
}

serve() { # the only container with a network: a browser must reach it
    local _at='' _n=$# _f _listen=${MILKTEA_LISTEN:-127.0.0.1:8014} _name=${MILKTEA_NAME:-} _pem=${MILKTEA_CERTIFICATE:+$(absolute "$MILKTEA_CERTIFICATE")}
    [ $# -ge 1 ] || { usage >&2; exit 2; }
    while [ "$_n" -gt 0 ]; do _f=$(run_folder "$1") || exit 2; shift; set -- "$@" "${_f##*/}=$_f/result/adapter.zip"; _at=${_at:-$_f} _n=$((_n - 1)); done
    [ -n "$DRY" ] || [ -s "$_at/token" ] || (umask 077; head -c 32 /dev/urandom | sha256sum | cut -c 1-43 >"$_at/token")
    NETWORK="bridge -p $_listen:${_listen##*:}" on_run "$_at" "$_pem" trainer.serve.server --base "$_at/model" --host 0.0.0.0 \
        --port "${_listen##*:}" --name "${_name:-${_listen%:*}}" --token-file "$_at/token" ${_pem:+--certificate "$_pem"} --feedback "$_at" "$@"
}

evaluate() {
    local _at _data=''
    _at=$(run_folder "${1:-}") || exit 2
    [ $# = 1 ] || _data=$(absolute "$2") && [ -z "$_data" ] || [ -f "$_data" ] || refuse "$2 does not exist" "ls"
    on_run "$_at" "$_data" trainer.eval.score "$_at" ${_data:+"$_data"}
}

merge() {
    local _at
    _at=$(run_folder "${1:-}") || exit 2
    on_run "$_at" '' trainer.result.merge "$_at/result/adapter.zip" --base "$_at/model" --out "$_at/merged-${2:-bf16}" --dtype "${2:-bf16}"
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
    train | chat | serve | evaluate | merge | status | logs | stop | images | rollback | prune | uninstall) $command "$@" ;;
    use) [ -f "$PREFIX/state/${1:-}" ] && echo "$1" >"$PREFIX/state/default" || refuse "no image ${1:-} is installed" "milktea-run images" ;;
    launch) inside -v "$(pwd):$(pwd)" -w "$(pwd)" -- accelerate launch "$@" ;;
    check) check "$@" ;;
    shell) inside -v "$(pwd):$(pwd)" -w "$(pwd)" -- sh "$@" ;;
    models) for _m in "$PREFIX"/models/by-name/* "$PREFIX"/models/by-name/*/*; do [ -f "$_m/config.json" ] && echo "${_m#"$PREFIX"/models/by-name/}"; done; : ;;
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
