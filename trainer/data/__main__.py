"""`python -m trainer.data FILE...`: checks training data and reports every defect."""

import sys

from trainer.data.files import main

sys.exit(main())
