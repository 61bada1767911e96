"""``python -m fasthessian``, the same as the command ``fasthessian``."""

from fasthessian.cli import main

if __name__ == "__main__":
    main()
