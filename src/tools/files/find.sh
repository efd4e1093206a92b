# Names what is below directory $1, each ended by NUL: of kind $2 (`file` with links, `directory`, `any`), with a name
# like $3. What has a name like one of the further arguments is left out, with all below it.

cd "$1" || exit 3
kind=$2 name=$3
shift 3
left=$#
while [ "$left" -gt 0 ]; do
  set -- "$@" -o -name "$1"
  shift
  left=$((left - 1))
done
case $kind in
  file) wanted='( -type f -o -type l )' ;;
  directory) wanted='-type d' ;;
  any) wanted= ;;
esac
set -f
# The bound is told by the length of the output.
find . ! -name . \( -name '' "$@" \) -prune -o ! -name . $wanted -name "$name" -print0 | head -c 8388608
