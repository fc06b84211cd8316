"""`python -m fedlora …`."""

from fedlora.main import main

if __name__ == "__main__":
    raise SystemExit(main())
