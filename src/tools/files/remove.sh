# Removes $1 with all it holds.

[ -e "$1" ] || [ -L "$1" ] || ls -d "$1" >/dev/null || exit 1
rm -rf "$1"
