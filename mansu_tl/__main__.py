"""`python -m mansu_tl`: the command line where the console script is not on the path."""

from mansu_tl.cli import main

if __name__ == "__main__":
    main()
