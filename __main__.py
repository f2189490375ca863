"""`python -m headrace`: the command, where its script is not on the PATH."""

from headrace.frontend.cli import main

if __name__ == "__main__":
    main()
