"`python -m dt_pretrain` is the command `dt-pretrain`, for where the package was not installed."
import sys

from .cli import main

sys.exit(main())
