"""`python -m rdm_fast`: the same as `rdm`."""

from rdm_fast.cli.commands import main

if __name__ == "__main__":
    main()
