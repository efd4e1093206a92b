# Moves $1 to $2; $3 is `overwrite` or empty, $4 `parents` or empty, $5 a name beside $2 that nobody else has.
#
# Says `moved`, `copied` where $2 is on another file system, or `refused CODE`.

source=$1 target=$2 overwrite=$3 parents=$4 beside=$5

refuse() {
  echo "refused $1"
  exit 1
}

device() {
  stat -c %d "$1" 2>/dev/null || stat -f %d "$1"
}

# Says why, where it is not there.
[ -e "$source" ] || [ -L "$source" ] || ls -d "$source" >/dev/null || exit 1
if [ -e "$target" ] || [ -L "$target" ]; then
  [ -n "$overwrite" ] || refuse exists
  if [ -d "$target" ]; then refuse is_a_directory; fi
  if [ -d "$source" ] && [ ! -L "$source" ]; then refuse not_a_directory; fi
fi
if [ -n "$parents" ]; then mkdir -p "${target%/*}/" || exit 1; fi
from=$(device "$source") && to=$(device "${target%/*}/") || exit 1
if [ "$from" = "$to" ]; then
  mv -f "$source" "$target" || exit 1
  echo moved
else
  cp -RPp "$source" "$beside" && mv -f "$beside" "$target" && rm -rf "$source" || exit 1
  echo copied
fi
