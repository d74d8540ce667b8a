"""``python -m models.diffusion``."""

from models.diffusion.program import main

if __name__ == "__main__":
    main()
