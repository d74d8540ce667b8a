"""``python -m models.hierarchical_vae``."""

from models.hierarchical_vae.program import main

if __name__ == "__main__":
    main()
