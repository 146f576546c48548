
# --- what this server keeps of a bundle, and how an update is made of it ---------------------------------------------------

kept_file() { # kept_file HEX: where the thing whose hash begins so is kept
    local _f
    for _f in "$PREFIX"/kept/*/*/"$1"*; do
        case $_f in *.part) continue ;; esac
        [ -f "$_f" ] && { echo "$_f"; return 0; }
    done
    return 1
}

paper() { # paper FILE: where a paper of this bundle lies, carried or restored
    if [ "$1" = INSTALL.sh ] && [ -n "${MILKTEA_BUNDLE:-}" ]; then echo "$0"
    elif [ -f "$BUNDLE/$1" ]; then echo "$BUNDLE/$1"
    else echo "$WORK/restored/$1"; fi
}

# Fills "recipes" (FILE MADE_OF_KEPT): yes where everything that the recipe copies is kept here.
read_recipes() {
    local _what _a _rest _file='' _ok=''
    : >"$WORK/recipes"
    [ -f "$BUNDLE/RECIPES" ] || return 0
    { cat "$BUNDLE/RECIPES"; echo file; } >"$WORK/recipes.plan"
    while read -r _what _a _rest; do
        case $_what in
            file)
                [ -n "$_file" ] && echo "$_file $_ok" >>"$WORK/recipes"
                _file=$_a _ok=yes ;;
            from) kept_file "$_a" >/dev/null || _ok=no ;;
        esac
    done <"$WORK/recipes.plan"
}

wanted_hash() { # wanted_hash FILE: what the plan says of a thing that is kept
    local _hex _bytes _path
    rows keep >"$WORK/keep"
    while read -r _hex _bytes _path; do
        if [ "$_path" = "$1" ]; then
            echo "$_hex"
            return 0
        fi
    done <"$WORK/keep"
    return 1
}

can_restore() { # can_restore FILE: by its recipe, or it is kept already, or a full bundle named by --also has it
    local _file _hex _ok
    _hex=$(wanted_hash "$1") || return 1
    if kept_file "$_hex" >/dev/null || whole_elsewhere "$1" "$_hex" >/dev/null; then return 0; fi
    while read -r _file _ok; do
        if [ "$_file" = "$1" ]; then [ "$_ok" = yes ]; return; fi
    done <"$WORK/recipes"
    return 1
}

whole_elsewhere() { # whole_elsewhere FILE HEX: in a folder of --also
    local _d
    printf '%s' "$ALSO" | {
        while read -r _d; do
            [ -f "$_d/$1" ] && [ "$(sum_of_stdin <"$_d/$1")" = "$2" ] && { echo "$_d/$1"; exit 0; }
        done
        exit 1
    }
}

restore() { # restore FILE: makes restored/FILE; true only if its hash is the one of the signed plan
    local _hex _out=$WORK/restored/$1 _from
    [ -f "$_out" ] && return 0
    _hex=$(wanted_hash "$1") || return 1
    mkdir -p "$(dirname "$_out")"
    if _from=$(kept_file "$_hex") || _from=$(whole_elsewhere "$1" "$_hex"); then cp "$_from" "$_out.part"
    else follow_recipe "$1" >"$_out.part"; fi
    [ "$(sum_of_stdin <"$_out.part")" = "$_hex" ] || { rm -f "$_out.part"; return 1; }
    mv "$_out.part" "$_out"
}

follow_recipe() { # follow_recipe FILE: its bytes
    local _what _a _b _on='' _at=0 _from='' _changes=$BUNDLE/CHANGES
    [ -f "$BUNDLE/RECIPES" ] || return 1
    case $1 in
        layers/*)
            _changes=$(plan changes) || _changes=
            case $_changes in
                '') ;;
                *,*) [ -f "$WORK/changes" ] || join_volumes "$_changes" >"$WORK/changes"; _changes=$WORK/changes ;;
                *) _changes=$(where "$_changes") || return 1 ;;
            esac ;;
    esac
    while read -r _what _a _b <&5; do
        case $_what in
            file) if [ "$_a" = "$1" ]; then _on=yes _at=$_b; else _on=; fi ;;
            from) [ -z "$_on" ] || _from=$(kept_file "$_a") || return 1 ;;
            copy) [ -z "$_on" ] || slice "$_a" "$_b" <"$_from" ;;
            take) [ -z "$_on" ] || { slice "$_at" "$_a" <"$_changes"; _at=$((_at + _a)); } ;;
        esac
    done 5<"$BUNDLE/RECIPES"
}

slice() { dd bs=1048576 iflag=fullblock,skip_bytes,count_bytes skip="$1" count="$2" 2>/dev/null; } # slice OFFSET BYTES: of stdin

# The papers that an update does not carry: "PATH" of each.
absent_papers() {
    local _hex _bytes _path
    rows keep | while read -r _hex _bytes _path; do
        case $_path in layers/* | image/* | INSTALL.sh) continue ;; esac
        [ -f "$(paper "$_path")" ] || echo "$_path"
    done
}

# The papers of an update, before anything is loaded.
restore_papers() {
    local _path
    absent_papers >"$WORK/absent"
    while read -r _path <&6; do
        restore "$_path" || die 4 "$_path cannot be made of what $PREFIX/kept has" "carry the full bundle of $ID and add --also DIR"
    done 6<"$WORK/absent"
}

# For the next update: the papers and small layers of this bundle, each under its hash. What cannot be kept is only said.
keep_files() {
    local _sha _bytes _path _blob _from _new _dir=$PREFIX/kept/$NAME/$ID
    mkdir -p "$_dir"
    rows keep >"$WORK/keep.all"
    rows blob >"$WORK/blobs"
    while read -r _sha _bytes _path <&6; do
        [ -f "$_dir/$_sha" ] && continue
        _new=$_dir/$_sha.part
        rm -f "$_new"
        if _from=$(kept_file "$_sha"); then ln "$_from" "$_new" 2>/dev/null || cp "$_from" "$_new"
        elif [ -f "$(paper "$_path")" ]; then cp "$(paper "$_path")" "$_new"
        elif _blob=$(carried_blob "$_sha"); then join_volumes "${_blob% *}" 2>/dev/null | slice "${_blob##* }" "$_bytes" >"$_new"
        fi
        if [ -f "$_new" ] && [ "$(sum_of_stdin <"$_new")" = "$_sha" ]; then mv "$_new" "$_dir/$_sha"
        else rm -f "$_new"; fi
    done 6<"$WORK/keep.all"
}

carried_blob() { # carried_blob HEX: "VOLUMES OFFSET" of a layer in this bundle's archives
    local _hex _rest
    while read -r _hex _rest; do [ "$_hex" = "$1" ] && { echo "$_rest"; return 0; }; done <"$WORK/blobs"
    return 1
}

# Of the images that are neither current nor previous nothing is kept.
drop_kept() {
    local _d _ref
    for _d in "$PREFIX/kept/$NAME"/*; do
        for _ref in "$(state_of current)" "$(state_of previous)"; do
            [ "${_ref##*:}" = "${_d##*/}" ] && continue 2
        done
        rm -rf "$_d"
    done
}
