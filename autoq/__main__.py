"""`python -m autoq`, for launchers such as torchrun that start modules."""

from autoq.cli import main

if __name__ == "__main__":
    main()
