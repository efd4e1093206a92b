# What is in directory $1, itself included, in three sections: the paths, each with a NUL behind it, and one more NUL; for
# each path a line of kind and permissions (hexadecimal), bytes and seconds since 1970, and an empty line; for each
# link what it says, followed by a line break, `x` and a NUL.

cd "$1" || exit 1
find . -print0 || exit 1
printf '\0'
if stat -c %f . >/dev/null 2>&1; then
  find . -exec stat -c '%f %s %Y' {} + || exit 1
else
  find . -exec stat -f '%Xp %z %m' {} + || exit 1
fi
echo
find . -type l -exec sh -c 'for link do printf "%s\0" "$(readlink "$link" && echo x)"; done' sh {} +
