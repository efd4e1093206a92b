# Tells of $1: kind, mode, owner, group, bytes and seconds since 1970 in a line, of what it points to where it is a link
# to something; then, of a link, what it says, to the end of the output.

look() {
  stat -c '%a %u %g %s %Y' "$@" 2>/dev/null || stat -f '%Mp%Lp %u %g %z %m' "$@"
}

if [ -e "$1" ]; then
  if [ -f "$1" ]; then
    kind=file
  elif [ -d "$1" ]; then
    kind=directory
  else
    kind=other
  fi
  facts=$(look -L "$1") || exit 1
else
  kind=symlink
  facts=$(look "$1") || exit 1
fi
echo "$kind $facts"
if [ -L "$1" ]; then readlink "$1"; fi
