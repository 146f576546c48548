"""Numbers of things in what people read."""


def number_of(n: int, thing: str, one: str = "", several: str = "") -> str:
    """ "1 row", "2,000 rows": `thing` takes an s where they are several. With a verb for `one` and
    for `several` "1 row is", "2,000 rows are"."""
    said, verb = (thing, one) if n == 1 else (f"{thing}s", several)
    return f"{n:,} {said} {verb}".rstrip()
