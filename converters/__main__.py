"""`python -m converters` is the command line."""

from converters.cli import main

if __name__ == "__main__":
    main()
