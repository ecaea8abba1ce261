"""`python -m unipinrec`, for launchers such as torchrun."""

from unipinrec.cli import main

main()
