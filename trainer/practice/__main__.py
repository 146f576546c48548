"""`python -m trainer.practice OUT_DIR`: the practice model and its rows."""

from trainer.practice.model import main

main()
