"""Pure: shell commands by which a box serves a result; ops/box/scripts.py has those of training.

The files are in `talk/` of the run's folder: `token`, `pid`, `log.txt`, `address` (the server's
line, written once it listens), `meter` (what the box costs) and, last, `ended`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from ops.box.scripts import LOG_BYTES, RENEW, run_folder

_MARK = "=talk="
_EXPORTED = 'while IFS= read -r pair; do export "$pair"; done'


def words(trainer: str) -> str:
    """The command that takes `serve` and `chat`, in the run's folder."""
    return "milktea-train" if trainer != "push" else "sh trainer-start.sh"


def serve(run_id: str, trainer: str, arguments: Sequence[str]) -> str:
    """Start the server of `arguments` detached, on the box's loopback. Idempotent. Its token is the
    first line of stdin; NAME=VALUE lines for its environment follow. The token is stored in a file
    of mode 0600 and in no process's arguments. From now on silence of the client ends the box,
    whatever limits.when_silent says of training."""
    more = ["--token-file", "talk/token", "--meter", "talk/meter", "--address", "talk/address"]
    command = shlex.join(["serve", *arguments, *more])
    wrapper = (
        f"trap : TERM; {words(trainer)} {command} >>talk/log.txt 2>&1; "
        "echo $? >talk/ended.new && mv talk/ended.new talk/ended"
    )
    return f"""\
umask 077
{RENEW}
rm -f milktea/launched
cd {run_folder(run_id)} && mkdir -p talk || exit 9
IFS= read -r token
{_EXPORTED}
if [ ! -e talk/ended ] && [ -s talk/pid ] && kill -0 "$(cat talk/pid)" 2>/dev/null; then
  echo running; exit 0
fi
rm -f talk/address talk/ended
echo "$token" >talk/token
setsid sh -c {shlex.quote(wrapper)} </dev/null >/dev/null 2>&1 &
echo $! >talk/pid || {{ kill -s KILL $! -$! 2>/dev/null; exit 8; }}
echo started
"""


def look(run_id: str) -> str:
    """Renew the lease and print the server's state: see `parse_look`."""
    return f"""\
{RENEW}
cd {run_folder(run_id)}/talk || exit 9
if [ -e ended ]; then echo "{_MARK} ended"; tail -c {LOG_BYTES} log.txt | tail -n 12
elif [ -s address ]; then echo "{_MARK} up"; head -c {LOG_BYTES} address
else echo "{_MARK} loading"; fi
"""


def parse_look(stdout: str) -> tuple[str, str]:
    """(`loading`, `up` or `ended`; its text: the address as JSON, or the last lines of its log).
    Raises ValueError for any other output."""
    first, _, rest = stdout.partition("\n")
    mark, _, state = first.strip().partition(" ")
    if mark != _MARK or state not in ("loading", "up", "ended"):
        raise ValueError(f"not an answer of a server's box: {first[:80]!r}")
    return state, rest.strip()


def port_of(address: str) -> int:
    """The port in the address line of a listening server. Raises ValueError."""
    told: Any = json.loads(address)
    if not isinstance(told, dict):
        raise ValueError("the server's address is no object")
    _, _, port = str(told.get("api", "")).removesuffix("/v1").rpartition(":")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"the server's port is {number}")
    return number


def tell_meter(run_id: str) -> str:
    """Write stdin to the file from which the server reads what the box costs."""
    return f"cd {run_folder(run_id)}/talk && cat >meter.new && mv meter.new meter"


def end_in(seconds: float) -> str:
    """Make the watchdog destroy the box in `seconds`, where that is sooner than its deadline."""
    return (
        f"read -r age rest <milktea/age && echo $((age + {int(seconds)})) >milktea/max_age.new "
        "&& mv milktea/max_age.new milktea/max_age"
    )


def keep_environment(run_id: str) -> str:
    """Store the NAME=VALUE lines of stdin for the next `terminal`, in a file of mode 0600."""
    return f"umask 077; cd {run_folder(run_id)} && mkdir -p talk && cat >talk/env"


def terminal(run_id: str, trainer: str, arguments: Sequence[str]) -> str:
    """Run a conversation on this command's terminal; it ends with the command."""
    return f"""\
cd {run_folder(run_id)} || exit 9
{_EXPORTED} <talk/env
rm -f talk/env
exec {words(trainer)} {shlex.join(["chat", *arguments])}
"""
