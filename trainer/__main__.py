"""`python -m trainer`, which is what `accelerate launch -m trainer` runs."""

from trainer.cli import main

main()
