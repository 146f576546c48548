
# --- may this driver and this GPU run a CUDA line? -------------------------------------------------------------------------
# The rules are NVIDIA's (CUDA Compatibility guide); the numbers come from PLAN. ops/image/driver.py is its twin on the
# packing side; one table of recorded cases holds both to the same answers.

in_list() { # in_list X A,B,C
    case ,$2, in *,"$1",*) return 0 ;; *) return 1 ;; esac
}

# runs_on CAP ARCHES PTX -> cubin | ptx | old | new. ARCHES are compute capabilities with compiled code; PTX those that
# the driver may compile for newer GPUs. Compiled code runs on the same major number with the same or a higher minor one;
# an "a" behind a number binds it to exactly that GPU.
runs_on() {
    local _major _minor _older _lists _arch
    _major=${1%.*} _minor=${1#*.} _older='' _lists=$2
    while [ -n "$_lists" ]; do
        _arch=${_lists%%,*}
        case $_lists in *,*) _lists=${_lists#*,} ;; *) _lists= ;; esac
        case $_arch in
            *[a-z])
                [ "${_arch%[a-z]}" = "$1" ] && { echo cubin; return; }
                continue ;;
        esac
        [ "${_arch%.*}" = "$_major" ] && [ "${_arch#*.}" -le "$_minor" ] && { echo cubin; return; }
        not_below "$1" "$_arch" && _older=yes
    done
    _lists=$3
    [ "$_lists" = - ] && _lists=
    while [ -n "$_lists" ]; do
        _arch=${_lists%%,*}
        case $_lists in *,*) _lists=${_lists#*,} ;; *) _lists= ;; esac
        not_below "$1" "$_arch" && { echo ptx; return; }
    done
    if [ -n "$_older" ]; then echo new; else echo old; fi
}

# verdict DRIVER CAP CLASS CUDA NATIVE FLOOR ARCHES PTX COMPAT
#   -> native | minor | ptx | compat | driver-too-old | gpu-too-old | gpu-too-new
verdict() {
    local _how
    [ "$4" = none ] && { echo native; return; }
    _how=$(runs_on "$2" "$7" "$8")
    case $_how in old) echo gpu-too-old; return ;; new) echo gpu-too-new; return ;; esac
    if not_below "$1" "$5"; then
        if [ "$_how" = ptx ]; then echo ptx; else echo native; fi
    elif [ "$_how" = cubin ] && not_below "$1" "$6"; then echo minor
    elif [ "$_how" = cubin ] && [ "$3" = datacenter ] && in_list "${1%%.*}" "$9"; then echo compat
    else echo driver-too-old; fi
}

# The last driver branch that knows a GPU: an update beyond it would take the GPU away.
last_branch() {
    case $1 in 3.*) echo 470 ;; 5.* | 6.* | 7.0 | 7.2) echo 580 ;; *) echo 99999 ;; esac
}

# A GPU's class by its name: forward compatibility is for data centre GPUs.
class_of() {
    case $1 in
        *GeForce* | *TITAN* | *Quadro* | *RTX*) echo other ;;
        *Tesla* | *" A"[0-9]* | *" H"[0-9]* | *" L"[0-9]* | *" B"[0-9]* | *" GH"[0-9]* | *" GB"[0-9]* | *" T4"* | *" V100"* | *" P"[0-9]*) echo datacenter ;;
        *) echo other ;;
    esac
}

# lines_for DRIVER CAP CLASS: the image lines of this project that run as they are.
lines_for() {
    local _fits _line _cuda _native _floor _arches _ptx _compat
    rows line >"$WORK/lines"
    _fits=
    while read -r _line _cuda _native _floor _arches _ptx _compat; do
        [ "$_cuda" = none ] && continue
        case $(verdict "$1" "$2" "$3" "$_cuda" "$_native" "$_floor" "$_arches" "$_ptx" "$_compat") in
            native | minor | ptx) _fits="$_fits${_fits:+ or }$_line" ;;
        esac
    done <"$WORK/lines"
    echo "$_fits"
}

# remedy VERDICT DRIVER CAP CLASS CUDA NATIVE FLOOR: what to do about it, in one sentence.
remedy() {
    local _needs _other _carry _update
    _needs=$7
    _other=$(lines_for "$2" "$3" "$4")
    _carry=${_other:+carry a bundle of the image line $_other}
    case $1 in
        native) echo "nothing to do" ;;
        minor) echo "nothing to do; a driver from $6 on would also allow compiling PTX of CUDA $5" ;;
        ptx) echo "nothing to do; the first start compiles for this GPU and takes minutes${_carry:+; $_carry to avoid it}" ;;
        gpu-too-old) echo "${_carry:-this GPU needs an older CUDA than any image line here has: use another GPU}" ;;
        gpu-too-new) echo "${_carry:-carry an image line with a newer CUDA}" ;;
        *)
            # code that must be compiled on the spot needs the driver of its own toolkit, not only of its family
            [ "$(runs_on "$3" "$PLAN_ARCHES" "$PLAN_PTX")" = ptx ] && _needs=$6
            _update=
            [ "${_needs%%.*}" -le "$(last_branch "$3")" ] && _update="update the driver to $_needs or newer"
            [ "$1" = compat ] && _update="$_update, or start with MILKTEA_CUDA_COMPAT=the folder of NVIDIA's package cuda-compat-$(echo "$5" | tr . -)"
            echo "$_update${_update:+${_carry:+, or }}$_carry"
            ;;
    esac
}
