"""`python -m unipinrec`, for launchers such as torchrun."""

from unipinrec.cli.main import main

main()
