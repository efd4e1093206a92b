# Names the files below directory $1, each in a line, that are no larger than $2 blocks of 512 bytes and have a line with
# one of the texts in the lines of $3; $4 is `i` where upper and lower case are the same. $5 is what names are like, and what
# has a name like one of the further arguments is left out, with all below it.

cd "$1" || exit 3
blocks=$2 texts=$3 flags=$4 name=$5
shift 5
left=$#
while [ "$left" -gt 0 ]; do
  set -- "$@" -o -name "$1"
  shift
  left=$((left - 1))
done
# The bound is told by the length of the output.
find . ! -name . \( -name '' "$@" \) -prune -o -type f -size "-$((blocks + 1))" -name "$name" \
  -exec grep "-lIF$flags" -e "$texts" {} + | head -c 4194304
