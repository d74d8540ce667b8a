"""``python -m models.compare``: says what it will do before it loads anything heavy, then does it."""

from models.compare.recipes import announcement, parse

if __name__ == "__main__":
    request = parse()
    print(announcement(request), flush=True)
    from models.compare.program import run

    run(request)
