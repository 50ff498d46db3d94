"""``python -m controllability`` is the command line."""

from controllability.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
