
# --- what this server keeps of a bundle, and how an update is made of it ---------------------------------------------------

kept_file() { # kept_file HEX: where the thing with this hash is kept
    local _f
    for _f in "$PREFIX"/kept/*/*/"$1"; do [ -f "$_f" ] && { echo "$_f"; return 0; }; done
    return 1
}

paper() { # paper FILE: where a paper of this bundle lies, carried or restored
    if [ "$1" = INSTALL.sh ] && [ -n "${MILKTEA_BUNDLE:-}" ]; then echo "$0"
    elif [ -f "$BUNDLE/$1" ]; then echo "$BUNDLE/$1"
    else echo "$WORK/restored/$1"; fi
}

# Fills "recipes" (FILE HEX MADE_OF_KEPT): yes where everything that the recipe copies is kept here.
read_recipes() {
    local _what _a _b _c _file='' _hex='' _ok='' _last=''
    : >"$WORK/recipes"
    [ -f "$BUNDLE/RECIPES" ] || return 0
    { cat "$BUNDLE/RECIPES"; echo file; } >"$WORK/recipes.plan"
    while read -r _what _a _b _c; do
        case $_what in
            file)
                [ -n "$_file" ] && echo "$_file $_hex $_ok" >>"$WORK/recipes"
                _file=$_a _hex=$_c _ok=yes _last= ;;
            copy)
                [ "$_a" = "$_last" ] || kept_file "$_a" >/dev/null || _ok=no
                _last=$_a ;;
        esac
    done <"$WORK/recipes.plan"
}

can_restore() { # can_restore FILE: by its recipe, or it is kept already, or a full bundle named by --also has it
    local _file _hex _ok
    while read -r _file _hex _ok; do
        [ "$_file" = "$1" ] || continue
        [ "$_ok" = yes ] || kept_file "$_hex" >/dev/null || whole_elsewhere "$1" "$_hex" >/dev/null
        return
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

restore() { # restore FILE: makes restored/FILE; true only if its hash is the one of the signed recipe
    local _file _hex _ok _out=$WORK/restored/$1 _from
    [ -f "$_out" ] && return 0
    while read -r _file _hex _ok; do [ "$_file" = "$1" ] && break; done <"$WORK/recipes"
    [ "$_file" = "$1" ] || return 1
    mkdir -p "$(dirname "$_out")"
    if _from=$(kept_file "$_hex") || _from=$(whole_elsewhere "$1" "$_hex"); then cp "$_from" "$_out.part"
    else follow_recipe "$1" >"$_out.part"; fi
    [ "$(sum_of_stdin <"$_out.part")" = "$_hex" ] || { rm -f "$_out.part"; return 1; }
    mv "$_out.part" "$_out"
}

follow_recipe() { # follow_recipe FILE: its bytes
    local _what _a _b _c _on='' _changes
    _changes=$(plan changes) || _changes=
    case $_changes in
        '') ;;
        *,*) [ -f "$WORK/changes" ] || join_volumes "$_changes" >"$WORK/changes"; _changes=$WORK/changes ;;
        *) _changes=$(where "$_changes") || return 1 ;;
    esac
    while read -r _what _a _b _c <&5; do
        case $_what in
            file) if [ "$_a" = "$1" ]; then _on=yes; else _on=; fi ;;
            copy) [ -n "$_on" ] && slice "$_b" "$_c" <"$(kept_file "$_a")" ;;
            take) [ -n "$_on" ] && slice "$_a" "$_b" <"$_changes" ;;
        esac
    done 5<"$BUNDLE/RECIPES"
}

slice() { dd bs=1048576 iflag=fullblock,skip_bytes,count_bytes skip="$1" count="$2" 2>/dev/null; } # slice OFFSET BYTES: of stdin

# The papers of an update, before anything is loaded.
restore_papers() {
    local _file _hex _ok
    while read -r _file _hex _ok <&6; do
        case $_file in layers/* | image/*) continue ;; esac
        restore "$_file" || die 4 "$_file cannot be made of what $PREFIX/kept has" "carry the full bundle of $ID and add --also DIR"
    done 6<"$WORK/recipes"
}

# For the next update: the papers and small layers of this bundle, each under its hash. What cannot be kept is only said.
keep_files() {
    local _sha _bytes _path _files _offset _from _new _dir=$PREFIX/kept/$NAME/$ID
    mkdir -p "$_dir"
    rows keep >"$WORK/keep"
    while read -r _sha _bytes _path _files _offset <&6; do
        [ -f "$_dir/$_sha" ] && continue
        _new=$_dir/$_sha.part
        rm -f "$_new"
        if _from=$(kept_file "$_sha"); then ln "$_from" "$_new" 2>/dev/null || cp "$_from" "$_new"
        elif [ "$_files" != - ]; then join_volumes "$_files" 2>/dev/null | slice "$_offset" "$_bytes" >"$_new"
        elif [ -f "$(paper "$_path")" ]; then cp "$(paper "$_path")" "$_new"
        fi
        if [ -f "$_new" ] && [ "$(sum_of_stdin <"$_new")" = "$_sha" ]; then mv "$_new" "$_dir/$_sha"
        else rm -f "$_new"; fi
    done 6<"$WORK/keep"
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
