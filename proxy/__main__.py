"""`python -m proxy` is the command `breakwater`."""

from proxy.cli import main

if __name__ == "__main__":
    main()
