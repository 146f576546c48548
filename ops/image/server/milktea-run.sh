#!/bin/sh
# Trains, talks and scores inside the installed image: no network, read-only image, GPUs, your own user, shared memory for
# several GPUs. The job files are the same as for renting. Needs sh, docker and coreutils.
# shellcheck shell=dash disable=SC2015,SC2046,SC2086,SC2116
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

PREFIX=${MILKTEA_PREFIX:-$(cd "$(dirname "$0")/.." && pwd)}
DOCKER=${DOCKER:-$(if command -v docker >/dev/null 2>&1 || ! command -v podman >/dev/null 2>&1; then echo docker; else echo podman; fi)}
RUNS=${MILKTEA_RUNS:-$(pwd)/milktea}
GPUS=${MILKTEA_GPUS:-all}
DRY=${MILKTEA_DRY_RUN:-}
DETACHED='' NAMED='' NETWORK=none TURN=${MILKTEA_TURN:-/tmp/milktea-turn}

current_image() {
    local _name _key _ref
    [ -z "${MILKTEA_IMAGE:-}" ] || { echo "$MILKTEA_IMAGE"; return; }
    _name=$(cat "$PREFIX/state/default" 2>/dev/null) || refuse "no image is installed in $PREFIX" "sh INSTALL.sh, or MILKTEA_PREFIX=the --prefix that was used"
    while read -r _key _ref; do [ "$_key" != current ] || echo "$_ref"; done <"$PREFIX/state/$_name"
}

# GPUs by the toolkit's runtime, or by CDI; none where the image or the server has none.
gpu_flags() {
    local _cdi _g
    [ "$GPUS" = none ] && return
    case $($DOCKER info --format '{{json .Runtimes}}' 2>/dev/null) in
        *nvidia*)
            case $GPUS in device=*) echo "--gpus \"$GPUS\"" ;; *) echo "--gpus $GPUS" ;; esac
            return ;;
    esac
    for _cdi in /etc/cdi/*nvidia* /var/run/cdi/*nvidia*; do
        [ -f "$_cdi" ] || continue
        case $GPUS in
            all) set -- all ;; device=*) set -- $(echo "${GPUS#device=}" | tr , ' ') ;; *) set -- $(seq 0 $((GPUS - 1))) ;;
        esac
        for _g; do echo "--device nvidia.com/gpu=$_g"; done
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
    local _gpus _image _options _init _program='' _a _python _tools _zone
    _image=$(current_image) || exit 2
    _python=$(python_cache "$_image") _tools=$PREFIX/records/tools-${_image##*:} # those that came with it
    [ -d "$_tools" ] || _tools=$PREFIX/tools; mkdir -p "$RUNS/cache"
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
    for _a; do # EXTRA stays in front; ours, the image and the program come behind it
        shift
        case $_program-$_a in
            ---) _program=next ;;
            next-*)
                _program=$_a
                set -- "$@" -e HOME=/tmp -e USER=milktea -e LOGNAME=milktea -e PYTHONPATH=/tools -e "MILKTEA_MODELS=$PREFIX/models" \
                    -e "TRITON_CACHE_DIR=$RUNS/cache/triton" -e "TORCHINDUCTOR_CACHE_DIR=$RUNS/cache/inductor" \
                    ${_python:+-e "PYTHONPYCACHEPREFIX=$_python"} \
                    -v "$_tools:/tools:ro" -v "$PREFIX/models:$PREFIX/models:ro" -v "$RUNS:$RUNS" --entrypoint "$_program" "$_image" ;;
            *) set -- "$@" "$_a" ;;
        esac
    done
    if [ -n "${MILKTEA_CUDA_COMPAT:-}" ]; then set -- -v "$MILKTEA_CUDA_COMPAT:/cuda-compat:ro" -e LD_LIBRARY_PATH=/cuda-compat "$@"; fi
    if [ -n "$DRY" ]; then
        echo "docker run" $_options "$@"
        return
    fi
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

runs_now() { set -- $($DOCKER ps -q --filter label=milktea.run 2>/dev/null); [ $# = 0 ] || $DOCKER container inspect --format '{{index .Config.Labels "milktea.run"}} {{index .Config.Labels "milktea.gpus"}}' "$@" 2>/dev/null; } # NAME GPUS, of docker and of podman
trains() { case "$(runs_now)" in *"$(container_of "$1") "*) ;; *) return 1 ;; esac; } # trains RUN: its container is there

# take_turn: one run at a time, of every user of this server, from its look at the GPUs until its container shows which it has.
# flock lets go for a holder that dies; where it is missing, a folder is the lock, and is nobody's when it is five minutes old.
take_turn() {
    local _n=0 _began
    (umask 0; mkdir "$TURN") 2>/dev/null
    if command -v flock >/dev/null 2>&1; then
        exec 9<"$TURN"
        timeout 600 flock 9 || refuse "another run has been starting for ten minutes" "fuser -v $TURN names its process"
        return
    fi
    until mkdir "$TURN/taken" 2>/dev/null; do
        _began=$(stat -c %Y "$TURN/taken" 2>/dev/null) && [ $(($(date +%s) - _began)) -gt 300 ] && rmdir "$TURN/taken" 2>/dev/null
        [ $((_n += 1)) -lt 600 ] || refuse "another run has been starting for ten minutes" "rmdir $TURN/taken, if none is"
        sleep 1
    done
    trap 'rmdir "$TURN/taken" 2>/dev/null' EXIT
    trap 'exit 143' INT TERM HUP
}

# lease_gpus SHARE: GPUs that no run has. Two users of one server do not get the same card.
lease_gpus() {
    local _name _theirs _taken='' _free='' _n _all _s=${MILKTEA_PATIENCE_S:-60}
    [ "$GPUS" != none ] && [ -n "$(gpu_flags)" ] || return 0
    command -v nvidia-smi >/dev/null 2>&1 || return 0
    _all=$(timeout -k 5 "$_s" nvidia-smi --query-gpu=index --format=csv,noheader </dev/null 2>&1 || echo "exit code $? (124: no answer within $_s s)")
    case $(echo $_all) in '' | *[!0-9\ ]*) refuse "nvidia-smi does not list the GPUs: $(echo $_all | cut -c 1-200)" "dmesg | grep NVRM names the driver's error; --gpus none trains without" ;; esac
    take_turn
    while read -r _name _theirs; do
        if [ "$_theirs" = all ]; then _theirs=$(echo "$_all" | tr '\n' ,); fi
        [ "${_theirs:-none}" = none ] || _taken="$_taken,$_theirs"
    done <<LIST
$(runs_now)
LIST
    for _n in $_all; do case $_taken, in *,"$_n",*) ;; *) _free="$_free $_n" ;; esac; done
    case $GPUS in
        all) [ -n "$1" ] || [ -z "$_taken" ] || refuse "GPUs$(echo "$_taken" | tr , ' ') are in use by other runs" "--gpus N takes N free ones (free:${_free:- none}), milktea-run status says whose, --share takes all the same" ;;
        device=*)
            [ -n "$1" ] || for _n in $(echo "${GPUS#device=}" | tr , ' '); do
                case $_taken, in *,"$_n",*) refuse "GPU $_n is in use by another run" "choose another (free:${_free:- none}), or --share" ;; esac
            done ;;
        *)
            set -- "$GPUS" $_free
            [ $# -gt "$1" ] || refuse "$1 GPUs are wanted, free are:${_free:- none}" "wait, milktea-run status says for whom; or --share with --gpus all"
            GPUS=device=$(echo $_free | cut -d ' ' -f "1-$GPUS" | tr ' ' ,) ;;
    esac
}

train() {
    local _job _processes='' _run='' _folder _named _p _at _quiet='' _share='' _code
    [ $# -ge 1 ] || { usage >&2; exit 2; }
    _job=$(absolute "$1") && [ -f "$_job" ] || refuse "$1 does not exist" "ls *.toml"
    shift
    while [ $# -gt 0 ]; do
        case $1-${2:-} in --gpus- | --run-) refuse "$1 wants a value" "milktea-run --help" ;; esac
        case $1 in
            --gpus)
                case $2 in
                    all | none) GPUS=$2 ;;
                    *[!0-9,]* | ,* | *, | *,,* | 0) refuse "--gpus $2 is neither a number of GPUs nor a list of them" "--gpus 2 takes two free ones, --gpus 0,1 these" ;;
                    *,*) GPUS=device=$2 _processes=$(echo "$2" | tr , '\n' | wc -l) ;; *) GPUS=$2 _processes=$2 ;;
                esac
                shift 2 || exit 2 ;;
            --run) _run=$2; shift 2 || exit 2 ;;
            --detach) _quiet=yes; shift ;; --share) _share=yes; shift ;;
            *) usage >&2; exit 2 ;;
        esac
    done
    _run=$(run_name "${_run:-$(basename "$_job" .toml)-$(date +%Y%m%d-%H%M%S)}")
    _at=$RUNS/$_run _folder=$(dirname "$_job")
    if [ -f "$_at/job.toml" ] && [ "$(sha256sum <"$_job")" != "$(sha256sum <"$_at/job.toml")" ]; then
        refuse "run $_run was begun with another $(basename "$_job"): $_at/job.toml" "give the changed job a new name with --run, or restore the old one"
    fi
    # first ask which files the job names, then mount exactly these, read-only, under the paths that they have here
    _named=$(DRY='' GPUS=none inside -v "$_folder:$_folder:ro" -- python3 /tools/job_from_toml.py paths "$_job") || exit $?
    set -- -v "$_folder:$_folder:ro"
    while IFS= read -r _p; do
        case $_p in "$_folder"/*) continue ;; esac
        [ ! -e "$_p" ] || set -- "$@" -v "$_p:$_p:ro"
    done <<LIST
$_named
LIST
    [ -n "$DRY" ] || mkdir -p "$_at" || exit 2 # of two terminals that begin one run, the first does:
    [ -n "$DRY" ] || ! command -v flock >/dev/null 2>&1 || { exec 8<"$_at"; flock -n 8; } || refuse "run $_run is being begun by another terminal" "milktea-run status"
    ! trains "$_run" || refuse "run $_run trains already" "milktea-run logs -f $_run"
    if [ -f "$_at/job.json" ]; then
        echo "run $_run goes on from its last checkpoint"
    else
        GPUS=none inside "$@" -- python3 /tools/job_from_toml.py run "$_job" "$_at" $_processes || { rmdir "$_at" 2>/dev/null; exit 2; }
        [ -n "$DRY" ] || { cp "$_job" "$_at/job.toml" && current_image >"$_at/image"; }
    fi
    NAMED=$(container_of "$_run") DETACHED=yes
    # the end of this inner shell ends its turn
    _p=$(lease_gpus "$_share"; inside "$@" -w "$_at" -- python3 /tools/run_job.py 2>&1 8<&- 9<&-) || { _code=$?; [ -z "$_p" ] || echo "$_p" >&2; exit $_code; }
    exec 8<&-
    [ -z "$DRY" ] || { echo "$_p"; return; }
    echo "run $_run: $_at    (milktea-run logs -f $_run, milktea-run stop $_run)"
    [ -z "$_quiet" ] || return 0
    trap 'echo; echo "run $_run goes on: milktea-run logs -f $_run"; exit 0' INT HUP
    $DOCKER logs -f "$NAMED" 2>&1; ended "$_run"
}

gone() { while $DOCKER container inspect "$(container_of "$1")" >/dev/null 2>&1; do sleep 1; done; } # gone RUN: its name is free again

ended() { # ended RUN: how it ended
    local _code
    gone "$1"
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
    if [ -n "$_follow" ] && trains "${_at##*/}"; then
        $DOCKER logs -f "$(container_of "${_at##*/}")" 2>&1; ended "${_at##*/}"
    else cat "$_at/log.txt"; fi
}

stop() {
    $DOCKER stop -t 600 "$(container_of "${AT##*/}")" >/dev/null 2>&1 || refuse "run $1 does not train" "milktea-run status"
    gone "${AT##*/}"; echo "run $1 stopped; milktea-run train JOB.toml --run $1 goes on"
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
                *) $DOCKER rmi "$_image" >/dev/null 2>&1 </dev/null && rm -rf "$PREFIX/records/tools-${_image##*:}" && echo "removed $_image ($_size with what it shares)" ;;
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

# on_run FILE MODULE ARGUMENTS...: a module of the trainer over what the run in AT made; FILE is one more to read, or ''.
# What a result can do is one function here that calls this.
on_run() {
    local _file=$1 _module=$2 _model
    shift 2
    _model=$(readlink "$AT/model") # the installed models are mounted always
    case $_model in "$PREFIX/models"/*) _model='' ;; *) [ -d "$_model" ] || _model='' ;; esac
    inside ${_model:+-v "$_model:$_model:ro"} ${_file:+-v "$_file:$_file:ro"} -v "$AT:$AT" -w "$AT" -- python3 -m "$_module" "$@"
}

chat() {
    shift
    if [ $# -gt 0 ]; then set -- --prompt "$*"; fi
    on_run '' trainer.serve.chat "$AT/result/adapter.zip" --base "$AT/model" "$@"
}

serve() { # the only container with a network: a browser must reach it
    local _n=$# _f _listen=${MILKTEA_LISTEN:-127.0.0.1:8014} _name=${MILKTEA_NAME:-} _pem=${MILKTEA_CERTIFICATE:+$(absolute "$MILKTEA_CERTIFICATE")}
    while [ "$_n" -gt 0 ]; do _f=$(run_folder "$1") || exit 2; shift; set -- "$@" "${_f##*/}=$_f/result/adapter.zip"; _n=$((_n - 1)); done
    [ -n "$DRY" ] || [ -s "$AT/token" ] || (umask 077; head -c 32 /dev/urandom | sha256sum | cut -c 1-43 >"$AT/token")
    NETWORK="bridge -p $_listen:${_listen##*:}" on_run "$_pem" trainer.serve.server --base "$AT/model" --host 0.0.0.0 \
        --port "${_listen##*:}" --name "${_name:-${_listen%:*}}" --token-file "$AT/token" ${_pem:+--certificate "$_pem"} --feedback "$AT" "$@"
}

evaluate() {
    local _data=''
    [ $# = 1 ] || _data=$(absolute "$2") && [ -z "$_data" ] || [ -f "$_data" ] || refuse "$2 does not exist" "ls"
    on_run "$_data" trainer.eval.score "$AT" ${_data:+"$_data"}
}

merge() { on_run '' trainer.result.merge "$AT" --out "$AT/merged-${2:-bf16}" --dtype "${2:-bf16}"; }

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
    train | status | logs | images | rollback | prune | uninstall) $command "$@" ;;
    stop | chat | serve | evaluate | merge) AT=$(run_folder "${1:-}") || exit 2; $command "$@" ;;
    use) [ -f "$PREFIX/state/${1:-}" ] && echo "$1" >"$PREFIX/state/default" || refuse "no image ${1:-} is installed" "milktea-run images" ;;
    launch) inside -v "$(pwd):$(pwd)" -w "$(pwd)" -- accelerate launch "$@" ;;
    check) check "$@" ;;
    shell) inside -v "$(pwd):$(pwd)" -w "$(pwd)" -- sh "$@" ;;
    models) for _m in "$PREFIX"/models/by-name/* "$PREFIX"/models/by-name/*/*; do [ -f "$_m/config.json" ] && echo "${_m#"$PREFIX"/models/by-name/}"; done; : ;;
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
