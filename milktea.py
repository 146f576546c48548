# the names that people import; ops/api/ and ops/declare/ say what is in them
from ops.api import *  # noqa: F403
from ops.declare import *  # noqa: F403
