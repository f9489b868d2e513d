"""`python -m nibblecast` is the command line."""

from nibblecast.converters.cli import main

if __name__ == "__main__":
    main()
