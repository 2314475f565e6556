#!/usr/bin/env bash
# One volume: nginx in the foreground, serving a folder. PORT=3001 ./volume.sh /data/volume1
# PORT (3001), HOST (all interfaces), SUBVOLUMES (10: sv00 to sv09, each of which may be a mount),
# ALLOW (everybody): addresses or networks, separated by blanks, only from which may be written.
# AUTH (everybody): a file of user:hash lines, who may come in. SECRET: a link signed with it may be read.
# "volume.sh servers URL COMMAND…" is for mkv.py: COMMAND, as $WORKERS processes; "demo": beside three volumes.
set -euo pipefail
PORT=${PORT:-3001} HOST=${HOST:-} SUBVOLUMES=${SUBVOLUMES:-10} ALLOW=${ALLOW:-} AUTH=${AUTH:-} SECRET=${SECRET:-}
die() { echo "volume.sh: $*" >&2; exit 2; }

if [ "${1:-}" = demo ] || [ "${1:-}" = servers ]; then
  at=${2#http://} host=${at%:*} server=/dev/tcp/${host//[][]/}/${at##*:}
  [ "$1" = servers ] || { (: <"$server") 2>/dev/null && die "port ${at##*:} is taken"; }
  set -m  # process groups of their own: Ctrl-C comes to this script alone
  volumes=() servers=() status=
  trap 'exec 2>/dev/null; kill $(jobs -p) || true; wait' EXIT  # bash would tell of each job
  trap 'status=0; kill "${servers[@]}" 2>/dev/null || exit 0' HUP INT TERM
  for port in $([ "$1" = servers ] || echo 3001 3002 3003); do
    HOST=127.0.0.1 PORT=$port setpriv --pdeathsig TERM "$0" "mkv-data/volume$port" &
    volumes+=($!)  # nginx will have this pid, and write it when it listens
    until [ "$(cat "mkv-data/volume$port/.nginx/pid" 2>/dev/null)" = $! ]; do
      kill -0 $! 2>/dev/null || exit 2  # it has said why
      sleep 0.02
    done
  done
  for ((i = 0; i < WORKERS; i++)); do setpriv --pdeathsig TERM "${@:3}" & servers+=($!); done
  if [ "$1" = demo ]; then
    until (: <"$server") 2>/dev/null || ! kill -0 "${servers[0]}" 2>/dev/null; do sleep 0.02; done
    printf '%s\n' "curl -X PUT -d swag $2/key" "curl -L $2/key" "curl '$2/?list'"
  fi
  while [ ${#servers[@]} != 0 ]; do  # a worker that is killed is started anew; if one ends by itself, so do all
    sleep 1 & wait -n "${servers[@]}" $! 2>/dev/null || true  # looking every second misses none
    for i in "${!servers[@]}"; do
      kill -0 "${servers[i]}" 2>/dev/null && continue
      wait "${servers[i]}" && ended=0 || ended=$?
      unset "servers[i]"
      if [ -z "$status" ] && [ "$WORKERS" != 1 ] && [ "$ended" -gt 128 ]; then
        setpriv --pdeathsig TERM "${@:3}" & servers[i]=$!
        sleep 0.2  # not as fast as it can die
      else
        [ -n "$status" ] || kill "${servers[@]}" 2>/dev/null || true
        [ "${status:-0}" != 0 ] || [ "$status$ended" = 0143 ] || status=$ended  # 143: of a second SIGTERM
      fi
    done
  done
  exit "$status"
fi
[ $# = 1 ] || die "usage: PORT=3001 ./volume.sh /data/volume1"
[[ $PORT =~ ^[0-9]+$ && $PORT -ge 1 && $PORT -le 65535 ]] || die "PORT=$PORT is not a port"
[[ $SUBVOLUMES =~ ^[0-9]+$ && $SUBVOLUMES -ge 1 && $SUBVOLUMES -le 256 ]] || die "SUBVOLUMES is 1 to 256"
if [ -n "$ALLOW" ]; then allow="default 0;"; else allow="default 1;"; fi
for address in $ALLOW; do
  [[ $address =~ ^[0-9A-Fa-f]*[.:][0-9A-Fa-f.:]+(/[0-9]+)?$ ]] || die "ALLOW=$ALLOW is not addresses with blanks between"
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
mkdir -p "$1" 2>/dev/null || die "cannot make $1"
root=$(readlink -f "$1")
[[ $root =~ ^[A-Za-z0-9_./+@%=-]+$ ]] || die "a path without blanks and quotes, please: $root"
mkdir -p "$root/.nginx" 2>/dev/null || die "cannot write to $root"
exec 9>"$root/.nginx/lock"  # which nginx keeps open
flock -n 9 || die "another volume has $root"

# The workers of a root-started nginx are the folder's owner, so that no folder is open to everybody.
owner=$(stat -c %U "$root") group=$(stat -c %G "$root") user=
[ "$(id -u)" != 0 ] || user="user $owner $group;"
own() { [ "$(id -u)" != 0 ] || chown "$owner:$group" "$@"; }
own "$root/.nginx"

# Uploads are written to .tmp on the drive they are for. What a killed nginx left there is garbage.
drive() {
  rm -rf "$1/.tmp" 2>/dev/null
  mkdir -p "$1/.tmp" 2>/dev/null && own "$1" "$1/.tmp" && [ -w "$1/.tmp" ]
}
drive "$root" || die "cannot write to $root"
block=$(sed -n 's/^#SUBVOLUME//p' <<<"$template") subvolumes=
for ((i = 0; i < SUBVOLUMES && SUBVOLUMES > 1; i++)); do
  sv=$(printf sv%02X "$i")
  if drive "$root/$sv"; then subvolumes+=${block//@SV@/$sv}$'\n'
  else echo "volume.sh: cannot write to $root/$sv: it is left out and answers 503" >&2; fi
done

[ -z "$AUTH" ] || template=${template//#AUTH/}
[ -z "$SECRET" ] || template=${template//#SECRET/}
config=$(grep -v '^#' <<<"$template")
config=${config//@SUBVOLUMES@/$subvolumes}
config=${config//@USER@/$user}
config=${config//@LISTEN@/${HOST:+$HOST:}$PORT}
config=${config//@ALLOW@/$allow}
config=${config//@ROOT@/$root}

# Neither the users nor the secret are for others to read, nor for a file that others have open.
rm -f "$root/.nginx/nginx.conf" "$root/.nginx/auth"
(umask 077 && printf '%s\n' "${config//@SECRET@/$SECRET}" >"$root/.nginx/nginx.conf")
if [ -n "$AUTH" ]; then  # a copy: the workers, which read it, may be another user
  (umask 077 && printf '%s\n' "$users" >"$root/.nginx/auth")
  own "$root/.nginx/auth"
fi
exec nginx -p "$root/.nginx" -e stderr -c "$root/.nginx/nginx.conf"
