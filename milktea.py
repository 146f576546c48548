from ops.api import *  # noqa: F403 - the name that people import; ops/api/ says what is in it
