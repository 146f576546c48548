"""Pure: the shell text by which a box does one more thing after its training, detached. What
belongs to it lies in a folder of its name in the run's folder: `pid`, `log.txt` and, last,
`exit_code`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ops.box.scripts import LOG_BYTES, RENEW, run_folder
from ops.box.serving import words

_MARK = "=errand="


def start(run_id: str, trainer: str, name: str, arguments: Sequence[str]) -> str:
    """Start `arguments` of the trainer, once: a second call finds it running or ended. NAME=VALUE
    lines on stdin are its environment."""
    wrapper = (
        f"trap : TERM; {words(trainer)} {shlex.join(arguments)} >>{name}/log.txt 2>&1; "
        f"echo $? >{name}/exit_code.new && mv {name}/exit_code.new {name}/exit_code"
    )
    return f"""\
{RENEW}
cd {run_folder(run_id)} && mkdir -p {name} || exit 9
while IFS= read -r pair; do export "$pair"; done
if [ -s {name}/pid ]; then echo there; exit 0; fi
setsid sh -c {shlex.quote(wrapper)} </dev/null >/dev/null 2>&1 &
echo $! >{name}/pid || {{ kill -s KILL $! -$! 2>/dev/null; exit 8; }}
echo started
"""


def look(run_id: str, name: str) -> str:
    """Renew the lease and tell how it does: see `parse_look`."""
    return f"""\
{RENEW}
cd {run_folder(run_id)}/{name} || exit 9
code=-; [ -e exit_code ] && code=$(cat exit_code)
echo "{_MARK} $code"
tail -c {LOG_BYTES} log.txt 2>/dev/null | tail -n 8
"""


def parse_look(stdout: str) -> tuple[int | None, str]:
    """(exit code, None while it runs; its last lines). Raises ValueError for what is no answer."""
    first, _, rest = stdout.partition("\n")
    mark, _, code = first.strip().partition(" ")
    if mark != _MARK:
        raise ValueError(f"not an answer of a box: {first[:80]!r}")
    return (None if code == "-" else int(code)), rest.strip()


def stop(run_id: str, name: str) -> str:
    """SIGKILL to its process group."""
    return (
        f"cd {run_folder(run_id)}/{name} && [ -s pid ] && "
        'kill -s KILL -- "-$(cat pid)" 2>/dev/null; true'
    )
