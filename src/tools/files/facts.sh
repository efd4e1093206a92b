# What systems tell in different ways of a file; other scripts begin with this one.

# What GNU's format $1, or else BSD's $2, tells of the file behind it.
facts() {
  gnu=$1 bsd=$2
  shift 2
  if stat -c %a / >/dev/null 2>&1; then stat -c "$gnu" "$@"; else stat -f "$bsd" "$@"; fi
}

# The SHA-256 of file $1, in $sum.
hash() {
  if command -v sha256sum >/dev/null; then
    sum=$(sha256sum <"$1")
  elif command -v shasum >/dev/null; then
    sum=$(shasum -a 256 <"$1")
  else
    sum=$(openssl dgst -sha256 -r <"$1")
  fi || return 1
  sum=${sum%% *}
}

