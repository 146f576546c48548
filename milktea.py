from ops.api import *  # noqa: F403 - the name that people import; ops/api.py says what is in it
