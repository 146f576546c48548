"""Pure: the shell text that a box is asked to run. POSIX sh; every word from outside is quoted;
nothing here executes anything.

All paths are relative to the login's home, where ssh starts: the same text serves root in a
container and a user anywhere.
"""

from __future__ import annotations

import shlex

HOME_FOLDER = "milktea"
# seconds without a client after which a box destroys itself, unless it may work on alone
LEASE_S = 600
NEVER = 999999999  # seconds: an age that no box reaches
WATCH_S = 15  # how often the box looks; overshoot of money and time is at most this

# Runs on the box for its whole life, armed by onstart before anything else. Environment:
# CONTAINER_API_KEY (may touch this instance only), CONTAINER_ID, MILKTEA_API, MILKTEA_MAX_S
# (seconds that the money or the hours allow), MILKTEA_LEASE_S, MILKTEA_WHEN_SILENT (finish,
# destroy), MILKTEA_HOLD_S (seconds or nothing).
#
# It counts its own age in seconds of /proc/uptime, which no date moves. `age` holds the age and the
# uptime of the last look: it survives a restart of the container, and of the host, so that a stop
# and start wins no time, and it is the heartbeat. `lease` holds the age at which the client was
# last heard. `armed` holds the HTTP status with which the key could read its own instance.
# `launched` holds the run's folder from the launch on: with finish, no silence ends the box then
# before its deadline, unless the training has ended and was held for as long as it may be. `ended`
# holds the age at which that was seen. `halt` says that the client stops the box to keep it: the
# time until the next start does not count then, and nothing is launched.
#
# `age`, `lease` and `max_age` are overwritten in place, each time by as many bytes: a disk that is
# full takes that, and no new file.
WATCHDOG = """\
cd "$HOME/milktea" || exit 1
ask() {
  url="$MILKTEA_API/api/v0/instances/$CONTAINER_ID/?owner=me"
  if command -v curl >/dev/null 2>&1; then
    method=$1
    if [ "$method" = GET ]; then set --; else set -- -d '{}'; fi
    curl -sS -m 20 -o /dev/null -w '%{http_code}\\n' -X "$method" "$@" \\
      -H "Authorization: Bearer $CONTAINER_API_KEY" -H 'Content-Type: application/json' "$url"
  else
    python3 -c 'import os,sys,urllib.request as u
h={"Authorization":"Bearer "+os.environ["CONTAINER_API_KEY"],"Content-Type":"application/json"}
m,url=sys.argv[1:3]
try: print(u.urlopen(u.Request(url,None if m=="GET" else b"{}",h,method=m),timeout=20).status)
except Exception as e: print(getattr(e,"code",e))' "$1" "$url"
  fi
}
[ -e halt ] && rm -f launched ended
rm -f armed
echo $$ >watchdog.pid
age=0 last= lease=0 armed= ended=
[ -s age ] && read -r age last <age
[ -e halt ] && { last=; printf '%-24s\\n' "$age" 1<>lease; rm -f halt; }
[ -s ended ] && read -r ended rest <ended
max=$MILKTEA_MAX_S
while :; do
  [ -s max_age ] && read -r cap rest <max_age && [ "$cap" -lt "$max" ] && max=$cap
  read -r up rest <"${MILKTEA_UPTIME:-/proc/uptime}"; up=${up%.*}
  [ "${last:-$up}" -le "$up" ] || last=0
  age=$((age + up - ${last:-$up})) last=$up
  printf '%-24s\\n' "$age $up" 1<>age
  read -r heard rest <lease && [ -n "$heard" ] && lease=$heard
  silent=$((age - lease)) may=$MILKTEA_LEASE_S run= why=
  [ -s launched ] && read -r run rest <launched
  if [ -n "$run" ] && [ "$MILKTEA_WHEN_SILENT" = finish ]; then
    may=$max
    if [ -n "$MILKTEA_HOLD_S" ] && [ -e "$run/exit_code" ]; then
      [ -n "$ended" ] || { ended=$age; echo "$age" >ended; }
      may=$MILKTEA_HOLD_S
      [ $((age - ended)) -ge "$silent" ] || silent=$((age - ended))
    fi
  fi
  [ "$age" -ge "$max" ] && why=deadline
  [ "$silent" -ge "$may" ] && why=silence
  if [ -n "$why" ]; then
    echo "$age destroying this instance: $why" >>watchdog.log
    ask DELETE >>watchdog.log 2>&1
  elif [ -n "$CONTAINER_API_KEY" ] && [ "$armed" != 200 ]; then
    armed=$(ask GET 2>>watchdog.log); echo "$armed" >armed
  fi
  sleep "$MILKTEA_WATCH_S"
done
"""


def onstart(public_key: str) -> str:
    """What the box runs at each start: the watchdog first, then our key. Under vast.ai's 4,000
    characters."""
    key = shlex.quote(public_key.strip())
    return f"""\
umask 077; mkdir -p "$HOME/milktea" "$HOME/.ssh"; cd "$HOME/milktea" || exit 1
cat >watchdog.sh <<'WATCHDOG'
{WATCHDOG}WATCHDOG
[ -s lease ] || echo 0 >lease
[ -s max_age ] || echo {NEVER} >max_age
(setsid sh watchdog.sh </dev/null >/dev/null 2>&1 &)
touch "$HOME/.no_auto_tmux"
grep -qsF {key} "$HOME/.ssh/authorized_keys" || echo {key} >>"$HOME/.ssh/authorized_keys"
"""


def environment(
    api_url: str, max_s: float, when_silent: str, hold_s: float | None
) -> dict[str, str]:
    """For `create`: what the watchdog needs. No secret is in it: vast.ai itself adds the instance's
    own key."""
    return {
        "MILKTEA_API": api_url.rstrip("/"),
        "MILKTEA_MAX_S": str(int(max_s)),
        "MILKTEA_LEASE_S": str(LEASE_S),
        "MILKTEA_WATCH_S": str(WATCH_S),
        "MILKTEA_WHEN_SILENT": when_silent,
        "MILKTEA_HOLD_S": "" if hold_s is None else str(int(hold_s)),
    }


def end_at(age: int) -> str:
    """The watchdog destroys the box at this age in seconds, where that is sooner than it would."""
    return f"printf '%-24s\\n' {age} 1<>milktea/max_age"


def run_folder(run_id: str) -> str:
    return f"{HOME_FOLDER}/{run_id}"


# A process that nobody has buried yet does not run: the first process of a container may bury none.
# Its number may be another's since the container was started again: the words of `launch` tell.
ALIVE = (
    '[ -s pid ] && kill -0 "$(cat pid)" 2>/dev/null && grep -qs exit_code.new '
    '"/proc/$(cat pid)/cmdline"'
)
# When the watchdog began, which begins with its container: number 22 of /proc/PID/stat.
_CONTAINER = 'cut -d" " -f22 "/proc/$(cat ../watchdog.pid)/stat" 2>/dev/null'
# A box of milktea 0.1 has no `age`: its watchdog reads dates.
RENEW = (
    "printf '%-24s\\n' \"$([ -e milktea/age ] && cat milktea/age || date +%s)\" 1<>milktea/lease"
)


# Seconds without a sign of the watchdog; it looks every WATCH_S and may wait 20 s for an answer.
HEARTBEAT_S = 2 * WATCH_S + 25
# Each line that fails says why, and ends the look.
_PROOF = f"""\
[ -s watchdog.pid ] || {{ echo "it never started"; return 1; }}
read -r pid <watchdog.pid
grep -qs watchdog.sh "/proc/$pid/cmdline" || {{ echo "its process is gone"; return 1; }}
read -r up rest </proc/uptime; read -r age seen <age || {{ echo "it has no age yet"; return 1; }}
[ $((${{up%.*}} - seen)) -le {HEARTBEAT_S} ] || {{ echo "its heartbeat stands still"; return 1; }}
status=; [ -s armed ] && read -r status rest <armed
[ "$status" = 200 ] && return 0
echo "its key cannot read its own instance: HTTP ${{status:-none, CONTAINER_API_KEY is empty}}"
return 1
"""


def ready(run_id: str, wait_s: int = 30, *, since_0_1: bool = False) -> str:
    """Make the run folder, renew the lease and prove that the watchdog is armed: its process
    lives, it looked a moment ago, and its key reads its own instance. Prints ``armed``, or within
    `wait_s` seconds why it is not. A box that milktea 0.1 rented has `born` and no proof."""
    begun = f"mkdir -p {run_folder(run_id)}/data && {RENEW} || exit 9"
    older = "[ -s milktea/born ] && { echo armed; exit 0; }" if since_0_1 else ""
    return f"""\
{begun}
{older}
cd {HOME_FOLDER}
proven() {{
{_PROOF}}}
left={wait_s}
until why=$(proven); do
  [ $left -gt 0 ] || {{ echo "$why"; exit 1; }}
  left=$((left - 1)); sleep 1
done
echo armed
"""


def launch(run_id: str, trainer: str) -> str:
    """Start the training detached, once: a second call finds it running or finished.

    The training is a process group of its own, whose number is in `pid`; its `exit_code` appears
    last, by rename. The shell that writes it outlives a SIGTERM to the group. NAME=VALUE lines on
    stdin are its environment: they stand in no file and in no process's arguments. The watchdog is
    told that from now on there is something to be silent about."""
    command = "milktea-train job.json"
    if trainer == "push":
        # ops/box/bootstrap/trainer-start.sh, pushed with the trainer
        command = "sh trainer-start.sh"
    wrapper = (
        f"trap : TERM; {command} >>log.txt 2>&1; code=$?; "
        "until echo $code >exit_code.new && mv exit_code.new exit_code; do sleep 5; done"
    )
    return f"""\
{RENEW}
cd {run_folder(run_id)} || exit 9
echo {run_id} >../launched
if [ -e exit_code ]; then echo finished; exit 0; fi
if {ALIVE}; then echo running; exit 0; fi
while IFS= read -r pair; do export "$pair"; done
{_CONTAINER} >container
setsid sh -c {shlex.quote(wrapper)} </dev/null >/dev/null 2>&1 &
echo $! >pid || {{ kill -s KILL $! -$! 2>/dev/null; exit 8; }}
echo started
"""


def restarted(run_id: str) -> str:
    """Prints `yes` where the container was started again since the training was: its processes
    ended with it, its files are there."""
    return f"""\
cd {run_folder(run_id)} || exit 9
now=$({_CONTAINER})
[ -s container ] && [ -n "$now" ] && [ "$now" != "$(cat container)" ] && echo yes
true
"""


POLL_MARK = "=milktea="
LOG_BYTES = 1 << 14  # of a log's end: a progress bar may be one line of 300 MB


POLL_BYTES = 1 << 18  # of events in one answer


def poll(run_id: str, events_offset: int, max_bytes: int = POLL_BYTES) -> str:
    """One round trip: renew the lease, say whether it ended, and deliver events from
    `events_offset` on.

    Output: a header line ``=milktea= EXIT RUNNING SIZE`` (EXIT is ``-`` while it runs), then the
    raw bytes of events.jsonl."""
    return f"""\
{RENEW}
cd {run_folder(run_id)} || exit 9
running=no; {ALIVE} && running=yes
code=-; [ -e exit_code ] && code=$(cat exit_code)
size=$(wc -c <events.jsonl 2>/dev/null || echo 0)
echo "{POLL_MARK} $code $running" $size
tail -c +{events_offset + 1} events.jsonl 2>/dev/null | head -c {max_bytes}
true
"""


def parse_poll(stdout: bytes) -> tuple[int | None, bool, int, bytes]:
    """(exit code or None, running, size of events.jsonl, new event bytes) from `poll`'s output.
    Raises ValueError without its header."""
    first, _, rest = stdout.partition(b"\n")
    head = first.decode("utf-8", "replace")
    words = head.split()
    if len(words) != 4 or words[0] != POLL_MARK:
        raise ValueError(f"not a poll answer: {head[:80]!r}")
    code = None if words[1] == "-" else int(words[1])
    return code, words[2] == "yes", int(words[3]), rest


def log_tail(run_id: str, lines: int = 40) -> str:
    return f"tail -c {LOG_BYTES} {run_folder(run_id)}/log.txt 2>/dev/null | tail -n {lines}"


def kill_training(run_id: str) -> str:
    """SIGKILL to the training's process group, one that hears no other; what it left of a start is
    forgotten, so that `launch` starts it again."""
    return f"""\
cd {run_folder(run_id)} || exit 9
[ -s pid ] && kill -s KILL -- "-$(cat pid)" 2>/dev/null
rm -f pid exit_code exit_code.new
"""


def halt(run_id: str) -> str:
    """Before the box is stopped to be kept: end the training, so that `launch` starts it again, and
    tell the watchdog of its next start. Prints `ended`, and does nothing, where the training has
    ended well."""
    return f"""\
cd {run_folder(run_id)} || exit 9
[ "$(cat exit_code 2>/dev/null)" = 0 ] && {{ echo ended; exit 0; }}
: >../halt || exit 8
[ -s pid ] && kill -s KILL -- "-$(cat pid)" 2>/dev/null
rm -f pid exit_code exit_code.new
echo halted
"""


def stop_training(run_id: str, wait_s: int) -> str:
    """SIGTERM to the training's process group: it saves a checkpoint and leaves 143 in exit_code.
    Prints `ended` once no training runs; ends after `wait_s` seconds without that. Called again, it
    waits again."""
    return f"""\
cd {run_folder(run_id)} || exit 9
[ -s pid ] && kill -s TERM -- "-$(cat pid)" 2>/dev/null || {{ echo ended; exit 0; }}
n=0
while [ ! -e exit_code ] && {ALIVE}; do
  [ $n -lt {5 * wait_s} ] || exit 0
  n=$((n + 1)); sleep 0.2
done
echo ended
"""
