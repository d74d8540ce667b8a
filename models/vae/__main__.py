"""``python -m models.vae``."""

from models.vae.program import main

if __name__ == "__main__":
    main()
