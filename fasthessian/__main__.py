"""``python -m fasthessian``, the same as the command ``fasthessian``."""

from fasthessian.app.main import main

if __name__ == "__main__":
    main()
