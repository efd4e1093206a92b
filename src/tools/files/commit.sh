# Puts staged contents in the place of files and removes files: all of a list, or none of it.
#
# $1 is a name that nobody else has; then for each change five arguments: `put` or `remove`, the file, its staged content,
# its mode (octal; empty for that of the former file), and what has to be there: nothing said (empty), `missing`,
# `present`, or the SHA-256 of the content. With `put-parents` missing directories are made.
#
# Says `done` and a line per change (`created`, `replaced`, `removed`), or `refused INDEX CODE [SHA-256]` and has changed
# nothing; what the tools have to say about a failure is on the error stream.

# Signals do not stop it half-way: it is over soon, with all or with nothing.
trap '' HUP INT TERM

tag=$1 index=1 made=0 steps=0 outcomes= many=
shift
[ $# -le 5 ] || many=yes

# The former state, and the end.
refuse() {
  while [ "$steps" -gt 0 ]; do
    eval "place=\$place_$steps saved=\$saved_$steps"
    if [ -z "$saved" ]; then
      rm -f "$place"
    elif [ -e "$saved" ] || [ -L "$saved" ]; then
      # Two names of one file: renaming the one to the other may leave both.
      mv -f "$saved" "$place" && rm -f "$saved"
    fi
    steps=$((steps - 1))
  done
  while [ "$made" -gt 0 ]; do
    eval "rmdir \"\$made_$made\""
    made=$((made - 1))
  done
  echo "refused $((index - 1)) $*"
  exit 1
}

# Where $1 is once links are followed, in $place; what is behind a link need not be there.
follow() {
  place=$1 links=0
  while [ -L "$place" ]; do
    links=$((links + 1))
    [ "$links" -le 40 ] || return 1
    # The mark keeps line breaks at the end of the name.
    link=$(readlink "$place" && echo x) || return 1
    link=${link%??}
    case $link in
      /*) place=$link ;;
      *) place=${place%/*}/$link ;;
    esac
  done
}

# Makes directory $1 with its parents.
make() {
  if [ -z "$1" ] || [ -d "$1" ]; then return 0; fi
  make "${1%/*}" || return 1
  if mkdir "$1"; then
    made=$((made + 1))
    eval "made_$made=\$1"
  else
    [ -d "$1" ]
  fi
}

# Refuses unless what is there is what the change expects.
check() {
  follow "$target" || refuse symlink_loop
  if [ -d "$place" ]; then
    refuse is_a_directory
  elif [ -e "$place" ]; then
    [ -f "$place" ] || refuse not_a_file
    case $expected in
      '' | present) ;;
      missing)
        hash "$place" || sum=
        refuse exists "$sum"
        ;;
      *)
        hash "$place" || refuse failed
        [ "$sum" = "$expected" ] || refuse changed "$sum"
        ;;
    esac
    # Renaming asks for a writable directory only, yet a file that may not be written is not replaced.
    [ "$action" = remove ] || [ -w "$place" ] || refuse no_permission
  else
    case $action,$expected in
      put*, | put*,missing) ;;
      *) [ "$action" = remove ] && [ -L "$target" ] && [ -z "$expected" ] || refuse not_found ;;
    esac
  fi
}

# Gives the staged content the mode, and where that can be the owner, of the file that it replaces.
adopt() {
  if [ -e "$place" ]; then
    former=$(stat -c '%a %u:%g' "$place" 2>/dev/null || stat -f '%Mp%Lp %u:%g' "$place") || refuse failed
    fresh=$(stat -c '%u:%g' "$staged" 2>/dev/null || stat -f '%u:%g' "$staged") || refuse failed
    [ "$fresh" = "${former#* }" ] || chown "${former#* }" "$staged" 2>/dev/null || :
    [ -n "$mode" ] || mode=${former%% *}
  fi
  [ -z "$mode" ] || chmod "$mode" "$staged" || refuse failed
}

# Notes how the next step is undone: what is at $saved goes back to $place, or $place goes where nothing is saved.
undo_by() {
  steps=$((steps + 1))
  eval "place_$steps=\$place saved_$steps=\$saved"
}

apply() {
  if [ "$action" = remove ]; then
    # The link, not what it points to.
    place=$target outcome=removed
  elif [ -e "$place" ]; then
    outcome=replaced
  else
    outcome=created
  fi
  saved=${place%/*}/.exec-gateway-$tag.$index.old
  case $outcome in
    removed)
      undo_by
      mv -f "$place" "$saved" || refuse failed
      ;;
    replaced)
      adopt
      # A single rename is whole or not there by itself.
      if [ "$many" ]; then
        undo_by
        ln "$place" "$saved" 2>/dev/null || cp -p "$place" "$saved" || refuse failed
      fi
      mv -f "$staged" "$place" || refuse failed
      ;;
    created)
      if [ "$action" = put-parents ]; then make "${place%/*}" || refuse failed; fi
      adopt
      mv "$staged" "$place" || refuse failed
      saved=
      undo_by
      ;;
  esac
  outcomes="$outcomes
$outcome"
}

check_and_apply() {
  check
  apply
}

# Does $1 for each change, in their order.
each() {
  step=$1 index=0
  shift
  while [ $# -ge 5 ]; do
    index=$((index + 1)) action=$1 target=$2 staged=$3 mode=$4 expected=$5
    "$step"
    shift 5
  done
}

# All are looked at before the first is touched, and each again right before it is.
if [ "$many" ]; then each check "$@"; fi
each check_and_apply "$@"
while [ "$steps" -gt 0 ]; do
  eval "saved=\$saved_$steps"
  [ -z "$saved" ] || rm -f "$saved"
  steps=$((steps - 1))
done
echo "done$outcomes"
