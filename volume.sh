#!/usr/bin/env bash
# Starts one volume: fills in nginx.conf.tmpl, which says what a volume is, and becomes nginx.
set -euo pipefail
usage() {
  cat <<'END'
usage: PORT=3001 ./volume.sh /data/volume1

Serves a folder as a volume of mkv: nginx, in the foreground. The folder is made if it is not there.
What may stand in the environment, and what holds without it:

  PORT        3001
  HOST        all interfaces
  SUBVOLUMES  10: the drives sv00 to sv09 in the folder, each of which may be a mount point
              (1 to 256; 1: the folder itself is the only drive)
  ALLOW       everybody may write; else: addresses or networks, with blanks between, that may
  AUTH        everybody may come in; else: a file of user:hash lines
  SECRET      no links are signed; else: a link that is signed with it may be read without a password
END
}
warn() { echo "volume.sh: $*" >&2; }
die() { warn "$@"; exit 2; }

case ${1:-} in -h | --help) usage; exit ;; esac
[[ $# = 1 && $1 != -* ]] || die "usage: PORT=3001 ./volume.sh /data/volume1 (-h tells more)"
PORT=${PORT:-3001} HOST=${HOST:-} SUBVOLUMES=${SUBVOLUMES:-10}
ALLOW=${ALLOW:-} AUTH=${AUTH:-} SECRET=${SECRET:-}
[[ $PORT =~ ^[1-9][0-9]{0,4}$ && $PORT -le 65535 ]] || die "PORT=$PORT is not a port"
[[ $SUBVOLUMES =~ ^[1-9][0-9]{0,2}$ && $SUBVOLUMES -le 256 ]] || die "SUBVOLUMES is 1 to 256"
if [ -n "$ALLOW" ]; then allow="default 0;"; else allow="default 1;"; fi
for address in $ALLOW; do
  [[ $address =~ ^[0-9A-Fa-f]*[.:][0-9A-Fa-f.:]+(/[0-9]+)?$ ]] \
    || die "ALLOW=$ALLOW is not addresses with blanks between"
  allow+=" $address 1;"
done
if [ -n "$AUTH" ]; then
  users=$(cat "$AUTH" 2>/dev/null) || die "cannot read AUTH=$AUTH"
  [[ $users == *?:?* ]] || die "AUTH=$AUTH has no line of user:hash"
elif [ -n "$SECRET" ]; then die "SECRET protects nothing without AUTH"; fi
[[ $SECRET =~ ^([A-Za-z0-9_.+/=-]{16,})?$ ]] || die "SECRET is 16 or more letters, digits or _.+/=-"
PATH=$PATH:/usr/sbin:/usr/local/sbin
command -v nginx >/dev/null || die "nginx is not installed (apt-get install nginx)"
(: <"/dev/tcp/${HOST:-127.0.0.1}/$PORT") 2>/dev/null && die "port $PORT is taken"
template=$(<"$(dirname "$(readlink -f "$0")")/nginx.conf.tmpl")

# Prints the name of another drive than $2 whose marker the folder $1 bears, if it does: drives change places.
stranger() {
  local marker
  for marker in "$1"/.sv[0-9A-F][0-9A-F]; do
    if [ -d "$marker" ] && [ "$marker" != "$1/.$2" ]; then
      echo "${marker##*/.}"
      return
    fi
  done
}

mkdir -p "$1" 2>/dev/null || die "cannot make $1"
root=$(readlink -f "$1")
[[ $root =~ ^[A-Za-z0-9_./+@%=-]+$ ]] || die "a path without blanks and quotes, please: $root"
other=$(stranger "$root" "")
[ -z "$other" ] || die "$root is no volume, but the drive $other of one: it has the folder .$other"
mkdir -p "$root/.nginx" 2>/dev/null || die "cannot write to $root"
exec 9>"$root/.nginx/lock"  # which nginx keeps open
flock -n 9 || die "another volume has $root"

# The workers of a root-started nginx are the folder's owner, so that no folder is open to everybody.
owner=$(stat -c %U "$root") group=$(stat -c %G "$root") user=
[ "$(id -u)" != 0 ] || user="user $owner $group;"
own() { [ "$(id -u)" != 0 ] || chown "$owner:$group" "$@"; }
own "$root/.nginx"

# The volume's id, made at the first start. Synced before it gets its name: it is whole or not there.
id=$(cat "$root/.nginx/id" 2>/dev/null) || true
if ! [[ $id =~ ^[0-9a-f]{32}$ ]]; then
  id=$(</proc/sys/kernel/random/uuid)
  id=${id//-/} new=$root/.nginx/id.new
  { echo "$id" >"$new" && sync "$new" && own "$new" && mv "$new" "$root/.nginx/id"; } 2>/dev/null \
    || die "cannot write to $root/.nginx"
fi

# Uploads are written to .tmp on the drive they are for. What a killed nginx left there is garbage.
# The marker, a folder ($2) in the drive ($1), is how nginx sees at each request that the drive is there.
prepare() {
  rm -rf "$1/.tmp" 2>/dev/null
  mkdir -p "$1/.tmp" "$1/$2" 2>/dev/null && own "$1" "$1/.tmp" "$1/${2%%/*}" "$1/$2" && [ -w "$1/.tmp" ]
}

# One more drive ($1, with its marker's path in the volume, $2) for what the template says once a drive.
block=$(sed -n 's/^#SUBVOLUME//p' <<<"$template") look=$(sed -n 's/^#LOOK//p' <<<"$template")
blocks='' looks=''
add() {
  local filled=${block//@SV@/$1} looking=${look//@SV@/$1}
  [ "$1" = . ] || blocks+=${filled//@MARKER@/$2}$'\n'
  looks+=${looking//@MARKER@/$2}$'\n'
}

# A drive whose mount failed must not be taken for an empty one: its keys would look deleted, and new files
# would fill the disk under the mount point. So what once was a mount point is remembered, one a line.
# (Not so the root: what is remembered lies in it, and is away when the root is.)
prepare "$root" .tmp || die "cannot write to $root"
[ "$SUBVOLUMES" != 1 ] || add . .tmp
memory=$root/.nginx/mounts
mounts=$(cat "$memory" 2>/dev/null) || true
for ((i = 0; i < SUBVOLUMES && SUBVOLUMES > 1; i++)); do
  printf -v sv sv%02X "$i"
  marker=.$sv trouble='' other=$(stranger "$root/$sv" "$sv")
  if mountpoint -q "$root/$sv"; then
    marker+=/mounted  # which the folder under the mount point has not, even if it was a drive before
    [[ $mounts == *$sv* ]] || echo "$sv" 2>/dev/null >>"$memory" || die "cannot write to $root/.nginx"
  elif [[ $mounts == *$sv* ]]; then
    trouble="is not mounted, as it once was (to use the folder itself, strike $sv out of $memory)"
  fi
  if [ -n "$other" ]; then
    trouble="is the drive $other by its marker (to use it as $sv, remove $root/$sv/.$other)"
  fi
  [ -n "$trouble" ] || prepare "$root/$sv" "$marker" || trouble="cannot be written"
  if [ -z "$trouble" ]; then add "$sv" "$sv/$marker"
  else warn "$root/$sv is left out and answers 503 until the next start: it $trouble"; fi
done
[ ! -e "$memory" ] || own "$memory"

[ -z "$AUTH" ] || template=${template//#AUTH/}
[ -z "$SECRET" ] || template=${template//#SECRET/}
config=$(grep -v '^#' <<<"$template")
config=${config//@SUBVOLUMES@/$blocks}
config=${config//@LOOKS@/$looks}
config=${config//@USER@/$user}
config=${config//@LISTEN@/${HOST:+$HOST:}$PORT}
config=${config//@ALLOW@/$allow}
config=${config//@ID@/$id}
config=${config//@ROOT@/$root}

# Neither the users nor the secret are for others to read, nor for a file that others have open.
rm -f "$root/.nginx/nginx.conf" "$root/.nginx/auth"
(umask 077 && printf '%s\n' "${config//@SECRET@/$SECRET}" >"$root/.nginx/nginx.conf") 2>/dev/null \
  || die "cannot write to $root/.nginx"
if [ -n "$AUTH" ]; then  # a copy: the workers, which read it, may be another user
  (umask 077 && printf '%s\n' "$users" >"$root/.nginx/auth") 2>/dev/null || die "cannot write to $root/.nginx"
  own "$root/.nginx/auth"
fi
exec nginx -p "$root/.nginx" -e stderr -c "$root/.nginx/nginx.conf"
