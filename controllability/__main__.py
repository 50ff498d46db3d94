"""``python -m controllability`` is the command line."""

import os
import sys

if __name__ == "__main__":
    # -m puts the working directory first, where a file of the user's may be called as a package that is needed here
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
        del sys.path[0]
    from controllability.cli.main import main

    raise SystemExit(main())
